"""Run a study, as far as its results are missing, and rebuild the tables in its README.

    python recipes/studies/run.py recipes/studies/<paper> [--only 'lsq-*'] [--table]

One run after another: a float model for each task, then the trials (on the part held out of train), then the
final runs (on the test file, once). A result whose recipe, data and float model are unchanged is not made
again, and a run that was stopped goes on where it was. Results are a JSON file each in `results/`; what a
table says is made of them alone. A run of which its result is kept is removed (some 300 MiB each), unless
`--keep` is given; float models stay, and studies that share one share its training. Data is found in the
directory that QCOMPRESS_ASSETS names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from command import command, data_and_work
from jobs import Job, Place, arm_job, start_job
from results import check_size, read_result, result_of, write_document
from study import Study, read_study
from table import rebuild

from qcompress import api
from qcompress.errors import UsageError
from qcompress.schema.goals import METRICS
from qcompress.system.artifacts import sha256_file
from qcompress.system.reporter import Reporter
from qcompress.verdict.measured import measured


class Runner:
    """Runs the jobs of one study; float models are made when the first job needs them."""

    def __init__(self, study: Study, place: Place, only: str, keep: bool, reporter: Reporter) -> None:
        self.study, self.place, self.only, self.keep, self.reporter = study, place, only, keep, reporter
        self.cache = place.work.parent / ".cache"
        self.results = place.folder / "results"
        self.results.mkdir(exist_ok=True)

    def all(self, after: Callable[[], None]) -> None:
        """Trials, then every final run that is wanted and not there; `after` is called after each."""
        self.prepare()
        wanted = [job for job in self.study.jobs() if fnmatch("{}-{}-{}".format(*job), self.only)]
        choosers = dict.fromkeys(self.study.chooser(arm) for arm, _, _ in wanted)
        chosen = {arm: self.choose(arm) for arm in choosers if arm is not None}
        for arm, task, seed in wanted:
            settings = chosen.get(self.study.chooser(arm), {})
            job = arm_job(self.study, arm, task, seed, self.place, self.start(task), settings)
            file = self.results / f"{job.name}.json"
            if file.is_file() and read_result(file)["recipe_sha256"] == job.digest:
                self.reporter.say(f"{job.name}: its result is there")
                continue
            loaded = self.run(job)
            document = result_of(loaded, arm, task, job.digest, self.study.row)
            write_document(file, document)
            check_size(file)
            self.forget(loaded)
            after()

    def prepare(self) -> None:
        """Make what the study's own script makes, if it is not there."""
        made = self.place.made
        if self.study.prepare is None:
            return
        digest = sha256_file(self.place.folder / self.study.prepare)
        mark = made.with_name("made.sha256")  # of the script alone, not of what it imports
        if made.is_dir() and mark.is_file() and mark.read_text(encoding="utf-8") == digest:
            return
        shutil.rmtree(made, ignore_errors=True)
        partial = made.with_name("made.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        script = self.place.folder / self.study.prepare
        self.reporter.say(f"{script.name}: running")
        if subprocess.run([sys.executable, str(script), str(partial), str(self.place.data)]).returncode != 0:
            raise UsageError(f"{script} failed", fix="mend it, or see what it says above")
        partial.rename(made)
        mark.write_text(digest, encoding="utf-8")

    def start(self, task: str) -> tuple[Job, Path] | None:
        """The float model's job and run directory; a finished run is found again in its cache."""
        if self.study.start is None:
            return None
        job = start_job(self.study, task, self.place)
        made = self.place.work / "started" / f"{job.name}.json"
        if made.is_file():
            known = json.loads(made.read_text(encoding="utf-8"))
            if known["recipe_sha256"] == job.digest and (Path(known["run"]) / "verdict.json").is_file():
                return job, Path(known["run"])
        path = self.run(job).path.resolve()
        made.parent.mkdir(exist_ok=True)
        write_document(made, {"recipe_sha256": job.digest, "run": str(path)})
        return job, path

    def choose(self, arm: str) -> dict[str, Any]:
        """The overrides with the best mean score on the parts held out; every trial is in trials.json."""
        study, file = self.study, self.results / "trials.json"
        document = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        tasks = [task for task in study.trials.tasks or study.tasks if task in study.tasks_of(arm)]
        if not tasks:
            raise UsageError(f"{arm} has none of the tasks that trials are made on", fix="mend trials.tasks")
        known = {trial["recipe_sha256"]: trial for trial in document.get(arm, {}).get("trials", [])}
        trials = []
        for number, settings in enumerate(study.arms[arm].trials):
            for task in tasks:
                seed = study.trials.seed
                job = arm_job(study, arm, task, seed, self.place, self.start(task), settings, trial=number)
                trial = known.pop(job.digest, None)
                if trial is None:
                    loaded = self.run(job)
                    found = measured(loaded, study.row)
                    self.forget(loaded)
                    name, metric = found.split(None)
                    trial = {"set": settings, "task": task, "seed": seed, "recipe_sha256": job.digest}
                    trial |= {"metric": metric, "score": found.metrics[f"{name}.{metric}"]}
                trials.append(trial)
                document[arm] = {"trials": [*trials, *known.values()]}  # the run is gone already
                write_document(file, document)
                self.reporter.say(f"{job.name}: {trial['metric']} {trial['score']:.5g} on the part held out")
        chosen = best(trials)
        document[arm] = {"trials": trials, "chosen": chosen}
        write_document(file, document)
        return chosen

    def run(self, job: Job) -> api.LoadedRun:
        """One run of the line."""
        self.reporter.say(f"{job.name}: running")
        # a reporter of its own, which writes the log of a run that will be gone
        made = api.run(
            job.recipe, self.place.work, cache=self.cache, overrides=job.overrides, reporter=Reporter()
        )
        return api.load(made.path)

    def forget(self, loaded: api.LoadedRun) -> None:
        """Remove a run and what its stages left in the cache."""
        if self.keep:
            return
        for name in loaded.manifest["stages"]:
            folder = loaded.stage(name)
            if folder is not None and name != "load":
                shutil.rmtree(folder)
        shutil.rmtree(loaded.path.parent)


def best(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The overrides whose mean score over the tasks is best; the first of equals."""
    if len({METRICS[trial["metric"]] for trial in trials}) > 1:
        raise UsageError("the metrics of the trials point both ways", fix="choose tasks under trials.tasks")
    sign = -1 if METRICS[trials[0]["metric"]] == "lower" else 1
    scores: dict[str, list[float]] = {}
    for trial in trials:
        scores.setdefault(json.dumps(trial["set"], sort_keys=True), []).append(sign * trial["score"])
    return json.loads(max(scores, key=lambda settings: statistics.fmean(scores[settings])))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, run, rebuild."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--only", default="*", help="glob over <arm>-<task>-<seed>")
    parser.add_argument("--table", action="store_true", help="rebuild the README, run nothing")
    parser.add_argument("--keep", action="store_true", help="keep every run, not its result alone")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--data", type=Path, help="default: the directory that QCOMPRESS_ASSETS names")
    options = parser.parse_args(arguments)
    with command():
        folder = options.study.resolve()
        study = read_study(folder)
        if not options.table:
            place = Place(folder, *data_and_work(folder, options.data, options.out))
            runner = Runner(study, place, options.only, options.keep, Reporter())
            runner.all(lambda: rebuild(folder, study))
        print(rebuild(folder, study))


if __name__ == "__main__":
    main()
