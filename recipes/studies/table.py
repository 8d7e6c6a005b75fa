"""The tables of a study, made of its results and of nothing else, and their place in its README.

What lies between two marks of README.md is rebuilt; the text around them is a person's.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from plot import draw
from results import measured_of, read_results, spell_machine
from study import Study, TableOptions

from qcompress.errors import UsageError
from qcompress.report.compare_table import finding, interval
from qcompress.report.ladder import spell
from qcompress.verdict.compare import compare

BEGIN = "<!-- made of results/ by run.py: do not edit -->"
END = "<!-- end -->"


def rebuild(folder: Path, study: Study) -> str:
    """Write the generated part of README.md (and score.svg); returns it."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UsageError(f"{readme} has no place for the tables", fix=f"write the lines {BEGIN} and {END}")
    made, picture = generate(study, read_results(folder))
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{made}{END}{tail}", encoding="utf-8")
    if picture is not None:
        (folder / "score.svg").write_text(picture, encoding="utf-8")
    return made


def generate(study: Study, results: list[dict[str, Any]]) -> tuple[str, str | None]:
    """The generated part, and the plot where the study has one and all of its arms are measured."""
    wanted = set(study.jobs())
    results = [item for item in results if (item["arm"], item["task"], item["seed"]) in wanted]
    if not results:
        return f"\nNot yet measured: none of {len(wanted)} runs.\n\n", None
    lines = ["", *_header(results, len(wanted)), ""]
    for title, table in study.tables.items():
        lines += [f"### {title}", "", *_table(study, table, results), ""]
    picture = None
    if study.plot is not None:
        picture = draw(_series(study, results))
        lines += ["### Score against updates", "", "![score against updates](score.svg)", ""]
    return "\n".join(lines) + "\n", picture


def _header(results: list[dict[str, Any]], wanted: int) -> list[str]:
    """Which machine made the table, with which versions."""
    machines: dict[str, int] = {}
    versions: dict[str, set[str]] = {}
    for item in results:
        where = spell_machine(item["machine"])
        machines[where] = machines.get(where, 0) + 1
        for package in ("qcompress", "torch", "transformers", "onnxruntime", "onnxruntime-gpu"):
            if package in item["versions"]:
                versions.setdefault(package, set()).add(item["versions"][package])
    counted = "; ".join(f"{where} ({count} runs)" for where, count in sorted(machines.items()))
    tools = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in versions.items())
    missing = "" if len(results) == wanted else f" Missing: {wanted - len(results)} of {wanted} runs."
    return [f"Machine: {counted}. {tools}.{missing}"]


def _table(study: Study, table: TableOptions, results: list[dict[str, Any]]) -> list[str]:
    """Scores and cost of the arms, then their differences from the baseline, each as a sentence too."""
    arms, baseline = table.arms, table.baseline
    found = [item for item in results if item["arm"] in arms]
    have = {(item["arm"], item["task"]) for item in found}
    tasks = [task for task in study.tasks if any(task in study.tasks_of(arm) for arm in arms)]
    ready = [arm for arm in arms if all((arm, task) in have for task in tasks)]
    waiting = [arm for arm in arms if arm not in ready]
    lines = [f"Not yet measured: {', '.join(waiting)}.", ""] if waiting else []
    if baseline not in ready:
        return lines[:1]
    runs = [measured_of(item, study.row) for arm in ready for item in found if item["arm"] == arm]
    document = compare(runs, study.row, table.metric, baseline)
    lines += _scores(document, found)
    if document["differences"]:
        lines += ["", *_differences(document), ""]
        lines += [f"* {finding(document, item)}" for item in document["differences"]]
    return lines + [f"* note: {note}" for note in document["notes"]]


def _scores(document: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    tasks = document["tasks"]
    heads = [f"{task['task']} ({task['metric'].rpartition('.')[2]})" for task in tasks]
    heads += ["mean"] if len(tasks) > 1 else []
    sizes = _sizes(results)
    lines = _rows(["arm", *heads, "seeds", *(["MiB"] if sizes else []), "updates", "passes", "seconds"])
    floats = {}
    for task in tasks:
        scores = {item["rows"]["float"][task["metric"]] for item in results if item["task"] == task["task"]}
        floats[task["task"]] = statistics.fmean(scores)
    mean = [spell(statistics.fmean(floats.values()))] if len(tasks) > 1 else []
    empty = [""] * (5 if sizes else 4)
    lines.append(_row(["float", *(spell(value) for value in floats.values()), *mean, *empty]))
    for arm in document["arms"]:
        cells = [arm["arm"], *(_spread(task) for task in arm["tasks"])]
        cells += [_spread(arm["pooled"]) if arm["pooled"] else "-"] if len(tasks) > 1 else []
        seeds = sorted({len(task["seeds"]) for task in arm["tasks"]})
        cells.append(" or ".join(map(str, seeds)))
        cells += [f"{sizes[arm['arm']] / 2**20:.3g}"] if sizes else []
        for key in ("updates", "passes", "seconds"):
            mean_cost = statistics.fmean(task[key] for task in arm["tasks"])
            cells.append(f"{mean_cost:.0f}" if mean_cost >= 10 else f"{mean_cost:.2g}")
        lines.append(_row(cells))
    return lines


def _sizes(results: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of each arm's graph, the mean over its runs; nothing where a result has none."""
    if not all("onnx_bytes" in item for item in results):
        return {}
    arms = {item["arm"] for item in results}
    return {
        arm: statistics.fmean(item["onnx_bytes"] for item in results if item["arm"] == arm) for arm in arms
    }


def _differences(document: dict[str, Any]) -> list[str]:
    level = f"{100 * document['level']:.0f} %"
    titles = [
        f"against {document['baseline']}",
        "pairs",
        "difference",
        f"{level} paired t",
        f"{level} bootstrap",
    ]
    lines = _rows([*titles, "could have seen"])
    for item in document["differences"]:
        seen = "-" if item["detectable"] is None else f"{item['detectable']:.2g}"
        limits = [interval(item[key]).replace(" ", " to ") for key in ("t_interval", "bootstrap_interval")]
        lines.append(_row([item["arm"], str(len(item["pairs"])), f"{item['mean']:+.3g}", *limits, seen]))
    return lines


def _series(study: Study, results: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """For each line of the plot its points: updates, mean score over tasks and seeds, deviation of a seed."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for name, arms in study.plot.series.items():
        for arm in arms:
            runs = [measured_of(item, study.row) for item in results if item["arm"] == arm]
            if runs:
                entry = compare(runs, study.row)["arms"][0]
                pooled = entry["pooled"] or entry["tasks"][0]
                updates = statistics.fmean(task["updates"] for task in entry["tasks"])
                found.setdefault(name, []).append((updates, pooled["mean"], pooled["sd"] or 0.0))
    return found


def _spread(item: dict[str, Any]) -> str:
    return spell(item["mean"]) + ("" if item["sd"] is None else f" ± {item['sd']:.2g}")


def _rows(titles: list[str]) -> list[str]:
    return [_row(titles), "|" + "---|" * len(titles)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
