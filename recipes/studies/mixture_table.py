"""The tables of a study of mixtures, made of its results alone, and their place in its README."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import read_results, spell_machine
from scipy.stats import binomtest
from table import BEGIN, END

from qcompress.errors import UsageError
from qcompress.report.ladder import spell
from qcompress.verdict.paired import t_interval

if TYPE_CHECKING:
    from mixtures import MixtureStudy

Result = dict[str, Any]

Z = 1.96
"""Standard errors to both sides of a mean: 95 % of a normal distribution."""


def rebuild(folder: Path, study: MixtureStudy) -> str:
    """Write the generated part of README.md; returns it."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UsageError(f"{readme} has no place for the tables", fix=f"write the lines {BEGIN} and {END}")
    made = generate(study, read_results(folder))
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{made}{END}{tail}", encoding="utf-8")
    return made


def generate(study: MixtureStudy, results: list[Result]) -> str:
    """The generated part."""
    wanted = set(study.jobs())
    results = [item for item in results if (item["model"], item["seed"], item["budget"]) in wanted]
    if not results:
        return f"\nNot yet measured: none of {len(wanted)} results.\n\n"
    lines = ["", _header(results, len(wanted)), ""]
    for name, model in study.models.items():
        chosen = [item for item in results if item["model"] == name and item["budget"] is None]
        for budget in model.budgets if chosen else ():
            lines += [f"### {name} at the bytes of {budget}", "", *_divergence(chosen, budget, study), ""]
            tested = [item for item in results if item["model"] == name and item["budget"] == budget]
            lines += [*_tested(tested), ""] if tested else []
    return "\n".join(lines) + "\n"


def _header(results: list[Result], wanted: int) -> str:
    machines = sorted({spell_machine(item["machine"]) for item in results})
    packages = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu")
    versions = {
        f"{package} {item['versions'][package]}"
        for item in results
        for package in packages
        if package in item["versions"]
    }
    minutes = sum(item["core_seconds"] for item in results) / 60
    missing = "" if len(results) == wanted else f" Missing: {wanted - len(results)} of {wanted} results."
    return (
        f"Machine: {'; '.join(machines)}. {', '.join(sorted(versions))}. {minutes:.0f} core-minutes for "
        f"{len(results)} results.{missing}"
    )


# Divergence ---------------------------------------------------------------------------------------


def _divergence(results: list[Result], budget: str, study: MixtureStudy) -> list[str]:
    """What each way of choosing costs on fresh samples, then seed by seed."""
    found = [item["mixtures"][budget] for item in results]
    choosing, fresh = results[0]["samples"], found[0]["samples"]
    assert all(item["fresh"] for item in found)
    arms = {"uniform": ([item["uniform"] for item in found], [item["difference"] for item in found])}
    for control in study.controls:
        others = [item["controls"][control] for item in found]
        arms[control] = ([item["measured"] for item in others], [item["difference"] for item in others])
    sizes = {"uniform": {item["formats"][budget]["bytes"] for item in results}}
    sizes |= {name: {item["controls"][name]["bytes"] for item in found} for name in study.controls}
    mixed = [item["measured"] for item in found]
    lines = [
        f"{len(found)} seeds, {choosing} samples to choose and {fresh} fresh ones to judge; divergence from "
        f"the float model in {results[0]['unit']}.",
        "",
        *_head("weights", "bytes", "divergence", "mixture less it", "95 % paired t", "intervals below 0"),
        _row("mixture by sensitivity", _sizes({item["bytes"] for item in found}), _mean(mixed), "", "", ""),
    ]
    for name, (costs, differences) in arms.items():
        label = f"{budget} everywhere" if name == "uniform" else f"mixture by {name}"
        lines.append(_row(label, _sizes(sizes[name]), _mean(costs), *_over_seeds(differences)))
    lines += ["", *_head("seed", "mixture", *(f"less {name}" for name in arms))]
    for place, item in enumerate(results):
        cells = [_cost(differences[place], sign=True) for _, differences in arms.values()]
        lines.append(_row(str(item["seed"]), _cost(mixed[place]), *cells))
    return lines


def _over_seeds(differences: list[list[float]]) -> list[str]:
    """Mean difference, its interval over seeds, and in how many of them all of its interval is below 0."""
    means = [mean for mean, _ in differences]
    below = sum(mean + Z * error < 0 for mean, error in differences)
    limits = t_interval(means)
    interval = "-" if limits is None else f"{limits[0]:+.2g} to {limits[1]:+.2g}"
    return [f"{statistics.fmean(means):+.2g}", interval, f"{below} of {len(means)}"]


def _mean(costs: list[list[float]]) -> str:
    """Mean over the seeds and the deviation between them."""
    means = [mean for mean, _ in costs]
    return f"{statistics.fmean(means):.3g}" + (f" ± {statistics.stdev(means):.1g}" if len(means) > 1 else "")


def _cost(cost: list[float], sign: bool = False) -> str:
    return f"{cost[0]:{'+' if sign else ''}.3g} ± {cost[1]:.1g}"


def _sizes(found: set[int]) -> str:
    return " to ".join(f"{size:,}" for size in dict.fromkeys((min(found), max(found))))


# Test data ----------------------------------------------------------------------------------------


def _tested(results: list[Result]) -> list[str]:
    """The task's metrics of the ONNX files, as ONNX Runtime runs them. Seeds that chose one mixture have one
    row, and say no more than one of them.
    """
    sizes = [
        f"{statistics.fmean(item['onnx_bytes'][side] for item in results):,.0f}"
        for side in ("uniform", "mixture")
    ]
    lines = [
        f"On the test data, by ONNX Runtime; model.onnx has {sizes[0]} bytes uniform and {sizes[1]} mixed.",
        "",
        *_head("test data", "seeds", "float", "uniform", "mixture", "loss against uniform",
               "bounds of 5 % each", "could have seen"),
    ]  # fmt: skip
    notes = []
    for name in results[0]["sets"]:
        alike: dict[str, list[Result]] = {}
        for item in results:
            alike.setdefault(str(item["sets"][name]), []).append(item)
        for group in alike.values():
            found = group[0]["sets"][name]
            limits, seen = found["interval"], found["detectable"]
            lines.append(
                _row(
                    f"{name} ({found['metric']}, {found['samples']} samples)",
                    ", ".join(str(item["seed"]) for item in group),
                    *(spell(found[side]) for side in ("float", "uniform", "mixture")),
                    f"{found['loss']:+.2g}",
                    "-" if limits is None else f"{limits[0]:+.2g} to {limits[1]:+.2g}",
                    "-" if seen is None else f"{seen:.2g}",
                )
            )
        found = [group[0]["sets"][name] for group in alike.values()]
        notes += _alone(name, found) if "only_right" in found[0] else []
    return [*lines, *(["", *notes] if notes else [])]


def _alone(name: str, found: list[dict[str, Any]]) -> list[str]:
    """McNemar's exact test of each mixture, two-sided: how often only one of both is right."""
    told = []
    for item in found:
        uniform, mixture = (item["only_right"][side] for side in ("uniform", "mixture"))
        p = binomtest(uniform, uniform + mixture).pvalue if uniform + mixture else 1.0
        told.append(f"{uniform} and {mixture} (p = {p:.2g})")
    return [f"* {name}: samples that only the uniform format and only the mixture has right, with McNemar's "
            f"exact test, row by row: {'; '.join(told)}."]  # fmt: skip


def _head(*titles: str) -> list[str]:
    return [_row(*titles), "|" + "---|" * len(titles)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
