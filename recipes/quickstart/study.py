"""The study behind the table in `recipes/quickstart.yaml`: five arms, two formats, three seeds.

    python recipes/quickstart/study.py --out runs/study

Arms: float, ptq, ptq with the adapter's untrained start, lsq, quadapter. lsq and quadapter get the same
number of trials (two learning rates, at W8A8) chosen on the last tenth of the training text, which no final
run is measured on, and the same number of passes over the whole model: lsq's updates equal quadapter's
end-to-end updates plus one third of its block updates, since a block is one third of the model. Every run
uses its last state. Results go to results.json beside this file; a run that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

import qcompress
from qcompress import api

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
FORMATS = ("w8a8", "w4a8")
LSQ_STEPS = 120
TRIALS = {"lsq": (2e-5, 2e-4), "quadapter": (5e-3, 2e-2)}
ARMS = ("ptq", "ptq + start", "lsq", "quadapter")
PHASES = {"calibrate": {"steps": 60}, "finetune": {"steps": 60}}
CALIBRATION, SAMPLES = 128, 96
"""More updates and windows than the quickstart, which is to end within half a minute."""


def recipe(arm: str, form: str, seed: int, rate: float | None) -> dict[str, Any]:
    """The quickstart's recipe with another method, format, seed and learning rate."""
    values = yaml.safe_load((HERE.parent / "quickstart.yaml").read_text(encoding="utf-8"))
    values |= {"name": f"study-{form}-{arm.replace(' + ', '-')}", "seed": seed}
    values["format"]["preset"] = form
    values["build"]["here"] = "never"
    values["verify"]["distance_samples"] = 8
    del values["gate"]
    values["data"]["calibration"]["limit"], values["verify"]["samples"] = CALIBRATION, SAMPLES
    del values["train"]["phases"], values["train"]["lr"]
    if arm.startswith("ptq"):
        values["method"] = "ptq"
        values["adapter"] = "quadapter" if arm == "ptq + start" else "none"
    elif arm == "lsq":
        values["method"] = "lsq"
        values["train"] |= {
            "lr": {"weight": rate, "other": rate, "scale": 1e-3},
            "phases": {"finetune": {"steps": LSQ_STEPS}},
        }
    else:
        values["train"] |= {"lr": {"adapter": rate, "scale": 1e-3}, "phases": PHASES}
    values["model"]["source"] = str((HERE.parent / values["model"]["source"]).resolve())
    for data in (
        values["data"]["train"],
        values["data"]["calibration"],
        *values["data"]["evaluate"].values(),
    ):
        data["text"] = [str((HERE.parent / name).resolve()) for name in data["text"]]
    return values


def hold_out(values: dict[str, Any], out: Path) -> None:
    """Train on nine tenths of the training text and measure on the rest."""
    lines = (HERE / "text" / "shakespeare-train.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 9 // 10
    train, rest = (out / "train.txt").resolve(), (out / "held-out.txt").resolve()
    train.write_text("".join(lines[:cut]), encoding="utf-8")
    rest.write_text("".join(lines[cut:]), encoding="utf-8")
    values["name"] += "-trial"
    values["data"]["train"]["text"] = values["data"]["calibration"]["text"] = [str(train)]
    values["data"]["evaluate"] = {"held-out": {"text": [str(rest)]}}
    values["verify"]["samples"] = 32


def measure(values: dict[str, Any], out: Path) -> dict[str, float]:
    """Perplexities of the float and of the onnx row."""
    file = out / f"{values['name']}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    run = api.run(file, out)
    rows = {row["stage"]: row for row in api.load(run.path).parity["rows"]}
    return {
        f"{stage}.{name}": value
        for stage in ("float", "onnx")
        for name, value in rows[stage]["metrics"].items()
        if name.endswith(".perplexity")
    }


def choose(arm: str, form: str, out: Path) -> float:
    """The learning rate that does best on the held-out text, seed 0."""
    scores = {}
    for rate in TRIALS[arm]:
        values = recipe(arm, form, 0, rate)
        hold_out(values, out)
        scores[rate] = measure(values, out)["onnx.held-out.perplexity"]
        print(f"trial {form} {arm} {rate:g}: {scores[rate]:.3f}", flush=True)
    return min(scores, key=scores.get)


def main() -> None:
    """Run what is missing, write results.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    rates = {arm: choose(arm, FORMATS[0], out) for arm in TRIALS}
    for form in FORMATS:
        for arm in ARMS:
            rate = rates.get(arm)
            seeds = SEEDS if arm in TRIALS else SEEDS[:1]  # nothing random happens without training
            runs = []
            for seed in seeds:
                runs.append(measure(recipe(arm, form, seed, rate), out))
                print(f"{form} {arm} seed {seed}: {runs[-1]}", flush=True)
            results[f"{form} {arm}"] = {"learning_rate": rate, "seeds": list(seeds), "runs": runs}
            document = {"version": qcompress.__version__, "results": results}
            (HERE / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: mean and, over seeds, the spread."""
    rows = ["| format | arm | shakespeare | wikitext2 |", "|---|---|---|---|"]
    first = next(iter(results.values()))["runs"][0]
    floats = [f"{first[f'float.{text}.perplexity']:.2f}" for text in ("shakespeare", "wikitext2")]
    rows.append(f"| fp32 | float | {' | '.join(floats)} |")
    for name, result in results.items():
        form, arm = name.split(" ", 1)
        cells = []
        for text in ("shakespeare", "wikitext2"):
            values = [run[f"onnx.{text}.perplexity"] for run in result["runs"]]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        rows.append(f"| {form} | {arm} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
