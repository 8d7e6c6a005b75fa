"""Do mixtures that `sensitivity` finds beat a uniform format of equal bytes? Run, and rebuild the tables.

    python recipes/studies/mixtures.py recipes/studies/sensitivity [--only 'gpt2-*'] [--table]

mixtures.yaml names the models, the seeds that draw the samples, formats, budgets and controls. For each model
and seed `sensitivity` measures the layers, chooses a mixture for each budget and judges it on samples that
did not choose it: results/<model>-<seed>.json. Then the mixture and the uniform format go through the whole
line and are measured on the test data by the task's metric: results/<model>-<seed>-<budget>.json. A result
whose recipe, data and float model are unchanged is not made again. Data is found in the directory that
QCOMPRESS_ASSETS names.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from command import command, data_and_work
from jobs import essence
from mixture_table import rebuild
from pydantic import Field, ValidationError
from results import machine, write_document

from qcompress import api
from qcompress.errors import UsageError
from qcompress.pipeline.keys import versions_of
from qcompress.pipeline.stages.load import fingerprint, locate
from qcompress.recipe.load import load_recipe
from qcompress.recipe.yaml_file import read_yaml
from qcompress.schema.formats import Options
from qcompress.schema.goals import Goal
from qcompress.system.artifacts import read_json
from qcompress.system.fingerprint import stage_key
from qcompress.system.host import describe_host
from qcompress.system.reporter import Reporter
from qcompress.tasks.text import fingerprint as text_fingerprint
from qcompress.verdict.baseline.statistics import RIGHT, loss_of
from qcompress.verdict.measured import Measured, measured

NONE_LOST = Goal.model_validate({"max-degradation": 0})


class ModelOptions(Options):
    """One model of the study."""

    recipe: str
    start: str | None = None
    """Recipe of the float model; none: `recipe` names it."""
    formats: list[str] = Field(min_length=2)
    """What a layer may get."""
    budgets: list[str] = Field(min_length=1)
    """Uniform formats whose bytes a mixture may have."""
    seeds: list[int] = Field(min_length=1)
    """Of the draws of samples."""
    samples: int = Field(ge=2)
    fresh: int = Field(ge=2)
    deployed: list[str] = []
    """Budgets whose mixture, and whose uniform format, are measured on the test data."""
    set: dict[str, Any] = {}
    """Overrides; `{data}` stands for the data directory."""
    start_set: dict[str, Any] = {}


class MixtureStudy(Options):
    """mixtures.yaml."""

    title: str
    controls: list[str] = []
    models: dict[str, ModelOptions] = Field(min_length=1)

    def jobs(self) -> Iterator[tuple[str, int, str | None]]:
        """(model, seed, budget) of every result, seed by seed: first the choices, which have no budget, then
        what was chosen on the test data.
        """
        seeds = sorted({seed for model in self.models.values() for seed in model.seeds})
        drawn = [(name, seed) for seed in seeds for name, model in self.models.items() if seed in model.seeds]
        yield from ((name, seed, None) for name, seed in drawn)
        for name, seed in drawn:
            yield from ((name, seed, budget) for budget in self.models[name].deployed)


def read_mixtures(folder: Path) -> MixtureStudy:
    """mixtures.yaml of a folder. Raises UsageError with what is wrong in it."""
    file = folder / "mixtures.yaml"
    document = read_yaml(file, str(file))
    if document.mistakes:
        raise UsageError("\n".join(map(str, document.mistakes)), fix="name the study's folder")
    try:
        return MixtureStudy.model_validate(document.value)
    except ValidationError as error:
        raise UsageError(f"{file}: {error}") from None


def name_of(model: str, seed: int, budget: str | None) -> str:
    """Name of a result."""
    return f"{model}-{seed}" + (f"-{budget}" if budget else "")


@dataclass(frozen=True)
class Runner:
    """Makes the results of one study."""

    study: MixtureStudy
    folder: Path
    data: Path
    work: Path

    @property
    def cache(self) -> Path:
        """Shared with the other studies."""
        return self.work.parent / ".cache"

    def make(self, model: str, seed: int, budget: str | None) -> dict[str, Any] | None:
        """A result, or None where it is there already."""
        overrides = self.overrides(model)
        digest = self.digest(model, seed, overrides)
        file = self.folder / "results" / f"{name_of(model, seed, budget)}.json"
        if file.is_file() and read_json(file)["digest"] == digest:
            return None
        began = time.process_time()
        found = self.chosen(model, seed, overrides) if budget is None else self.deployed(
            model, seed, budget, overrides, digest
        )  # fmt: skip
        document = {"model": model, "seed": seed, "budget": budget, "digest": digest, **found}
        recipe = load_recipe(self.folder / self.study.models[model].recipe, overrides).recipe
        document |= {
            "core_seconds": round(time.process_time() - began, 1),
            "machine": machine(describe_host()),
            "versions": versions_of("verify", recipe),
        }
        write_document(file, document)
        return document

    def chosen(self, model: str, seed: int, overrides: list[str]) -> dict[str, Any]:
        """Costs of layers, and for each budget the mixture, the uniform format and the controls."""
        study, options = self.study, self.study.models[model]
        found: dict[str, Any] = {"mixtures": {}}
        for budget in options.budgets:
            document = api.sensitivity(
                self.folder / options.recipe, self.work, cache=self.cache, overrides=overrides,
                formats=options.formats, samples=options.samples, fresh=options.fresh, seed=seed,
                as_small_as=budget, controls=study.controls, wins=False, reporter=Reporter(),
            )  # fmt: skip
            found["mixtures"][budget] = document["mixture"]
            found |= {key: document[key] for key in ("samples", "unit", "float_bytes")}
            found["formats"] = {
                word: {key: item[key] for key in ("bytes", "all")}
                | {"alone": {name: layer["alone"] for name, layer in item["layers"].items()}}
                for word, item in document["formats"].items()
            }
        return found

    def deployed(self, model: str, seed: int, budget: str, overrides: list[str], digest: str
                 ) -> dict[str, Any]:  # fmt: skip
        """The task's metrics on the test data, and how much worse the mixture's are than the uniform ones."""
        choice = read_json(self.folder / "results" / f"{name_of(model, seed, None)}.json")
        if choice["digest"] != digest:
            raise UsageError(f"{model}-{seed} was chosen by other settings", fix="make it again first")
        fragment = choice["mixtures"][budget]["fragment"]
        sides = {
            "uniform": self.run(model, f"{model}-{budget}", {"weights": _long(budget)}, overrides),
            "mixture": self.run(model, f"{model}-{budget}-{seed}", fragment, overrides),
        }
        rows = {side: measured(run, "onnx") for side, run in sides.items()}
        floats = measured(sides["uniform"], "float").metrics
        sets = {}
        for name in rows["uniform"].sets:
            metric = rows["uniform"].split(f"{name}.")[1]
            sets[name] = {"metric": metric, "float": floats[f"{name}.{metric}"]} | _worse(rows, name, metric)
        onnx = {side: read_json(run.path / "sizes.json")["file_bytes"] for side, run in sides.items()}
        return {"sets": sets, "onnx_bytes": onnx}

    def run(self, model: str, name: str, form: dict[str, Any], overrides: list[str]) -> api.LoadedRun:
        """The whole line with this section `format` laid over the recipe's."""
        words = [f"format.{key}={json.dumps(value)}" for key, value in form.items()]
        recipe = self.folder / self.study.models[model].recipe
        made = api.run(recipe, self.work, cache=self.cache, overrides=[*overrides, f"name={name}", *words],
                       reporter=Reporter())  # fmt: skip
        return api.load(made.path)

    def overrides(self, model: str) -> list[str]:
        """Of a model's recipe, with the float model's run where it has one."""
        options = self.study.models[model]
        found = self._spelled(options.set)
        return found if options.start is None else [*found, f"model.run={json.dumps(str(self.start(model)))}"]

    def start(self, model: str) -> Path:
        """The float model's run; a finished one is found again by what it depends on."""
        options = self.study.models[model]
        recipe, overrides = self.folder / options.start, self._spelled(options.start_set)
        digest = _depends_on(recipe, overrides, self.data)
        mark = self.work / "started" / f"{model}.json"
        if mark.is_file():
            known = read_json(mark)
            if known["digest"] == digest and (Path(known["run"]) / "verdict.json").is_file():
                return Path(known["run"])
        made = api.run(recipe, self.work, cache=self.cache, overrides=overrides, reporter=Reporter())
        mark.parent.mkdir(exist_ok=True)
        write_document(mark, {"digest": digest, "run": str(made.path.resolve())})
        return made.path.resolve()

    def digest(self, model: str, seed: int, overrides: list[str]) -> str:
        """Of everything that a choice depends on."""
        options, study = self.study.models[model], self.study
        own = _depends_on(self.folder / options.recipe, overrides, self.data)
        rules = {"formats": options.formats, "budgets": options.budgets, "controls": study.controls}
        draws = {"seed": seed, "samples": options.samples, "fresh": options.fresh}
        return stage_key("mixtures", {"recipe digest": own, **rules, **draws})

    def _spelled(self, settings: dict[str, Any]) -> list[str]:
        words = {
            path: json.dumps(value).replace("{data}", str(self.data)) for path, value in settings.items()
        }
        return [f"{path}={value}" for path, value in words.items()]


def _depends_on(recipe: Path, overrides: list[str], data: Path) -> str:
    """Digest of a recipe, of the content of its files and of its float model; no path is in it."""
    resolved = load_recipe(recipe, overrides)
    values = essence(resolved.recipe, resolved.recipe.model_dump(mode="json", by_alias=True))
    values.pop("model")
    sections = resolved.recipe.data
    named = {"train": sections.train, "calibration": sections.calibration, **sections.evaluate}
    content = {name: text_fingerprint(part, resolved.base) for name, part in named.items() if part}
    model = fingerprint(locate(resolved.recipe.model, resolved.base))
    text = json.dumps(values, sort_keys=True).replace(str(data), "{data}")
    return stage_key("mixtures", {"values": text, "content": content, "model": model})


def _long(word: str) -> dict[str, Any]:
    """A weight format as a recipe says it."""
    from qcompress.pipeline.sensitivity.candidates import parse_format

    return parse_format(word).model_dump(mode="json")


def _worse(rows: dict[str, Measured], name: str, metric: str) -> dict[str, Any]:
    """How much worse the mixture is than the uniform format; of accuracies, who alone is right how often."""
    columns = {side: row.columns(name) for side, row in rows.items()}
    loss = asdict(loss_of(metric, NONE_LOST, columns["uniform"], columns["mixture"]))
    found = {
        "uniform": loss["baseline"], "mixture": loss["value"], "loss": loss["loss"],
        "interval": loss["interval"], "test": loss["test"], "p_worse": loss["p_value"],
        "detectable": loss["detectable"], "samples": len(next(iter(columns["uniform"].values()))),
    }  # fmt: skip
    if metric in RIGHT:
        uniform, mixture = (RIGHT[metric](columns[side]) for side in ("uniform", "mixture"))
        found["only_right"] = {"uniform": int((uniform & ~mixture).sum()),
                               "mixture": int((mixture & ~uniform).sum())}  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, run, rebuild."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--only", default="*", help="glob over <model>-<seed>[-<budget>]")
    parser.add_argument("--table", action="store_true", help="rebuild the README, run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--data", type=Path, help="default: the directory that QCOMPRESS_ASSETS names")
    options = parser.parse_args(arguments)
    with command():
        folder = options.study.resolve()
        study = read_mixtures(folder)
        if not options.table:
            data, work = data_and_work(folder, options.data, options.out)
            (folder / "results").mkdir(exist_ok=True)
            runner = Runner(study, folder, data, work)
            for job in study.jobs():
                if fnmatch(name_of(*job), options.only):
                    made = runner.make(*job)
                    Reporter().say(f"{name_of(*job)}: {'there' if made is None else 'made'}")
                    rebuild(folder, study)
        print(rebuild(folder, study))


if __name__ == "__main__":
    main()
