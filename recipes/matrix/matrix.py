"""Every family in every format, exported, checked, linted, certified, compared and built: one line each.

    python recipes/matrix/matrix.py [--only 'bert-w8a8-*'] [--table]

The GPT-2 is the bundled one; the encoders are MiniLM's weights (`layouts.py`), the vision models ResNet-20
and small ones (`images.py`), tuned for some minutes: they need the directory that QCOMPRESS_ASSETS names.
What is measured is kept in results.json, and the table in README.md is made of that alone. A cell that was
run before with the same code costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import images
import onnx
from layouts import FAMILIES as ENCODERS
from layouts import lay_out

from qcompress import api
from qcompress.cli import onnx_file
from qcompress.errors import QcompressError, UsageError
from qcompress.system.artifacts import read_json
from qcompress.system.reporter import Reporter

HERE = Path(__file__).parent
TARGET = "rtx-ada"
COMPUTE = ("fp32", "fp16")
CORPUS = Path("glue", "CoLA")
PICTURES = Path("images", "cifar10-jpeg", "cifar10_subset.npz")
FAMILIES = ("gpt2", *ENCODERS, *images.FAMILIES)
CONVOLUTIONAL = ("cifar-resnet", "resnet", "efficientnet", "mobilenet-v2")

MIXED = {
    "*.0.*": {"weights": {"bits": 4, "block": 64}, "activations": "float"},
    "*.1.*": {"weights": "int8", "activations": "float"},
    "*.2.*": {"weights": {"bits": 4, "container": "int8"}},
}
"""By block of the model; all the others are W8A8. Convolutions have no blocks of channels, and the ViT's 96
divide by 32 alone.
"""

BLOCK = {"vit": 32}

FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": {"preset": "w8a8"},
    "w8a8-points": {"preset": "w8a8", "attention": "int8", "residual": "int8"},
    "w8a16": {"preset": "w8a16"},
    "w4a16-g32": {"preset": "w4a16-g32"},
    "w4a16-g64": {"preset": "w4a16-g64"},
    "w4a16-g128": {"preset": "w4a16-g128"},
    "w4a8": {"preset": "w4a8"},
    "mixed": {"preset": "w8a8", "layers": MIXED},
    "ipq": {"preset": "ipq"},
}

VECTORS = {
    "cifar-resnet": {"*": 9},
    "resnet": {"*": 9, "*.embedder.*": 7, "*.shortcut.*": 4},
    "efficientnet": {
        "*": 4,
        "*.embeddings.*": 9,
        "*.squeeze_excite.*": 2,
        "*.depthwise_conv": 9,
        "*.blocks.[34].*.depthwise_conv": 25,
    },
    "mobilenet-v2": {"*": 4, "*3x3*": 9, "*.first_conv.*": 9},
}
"""Lengths of the vectors of `ipq` in convolutions, the last match: kernels, as in its paper, and pieces of
those of 7 x 7; 4 channels of a 1 x 1.
"""

HEADS = dict.fromkeys(FAMILIES, "*classifier*") | {"gpt2": "lm_head", "cifar-resnet": "linear"}

LIMITS = {"fp32": (2e-4, 0.998), "fp16": (2e-3, 0.99)}
"""Parity of the ONNX row on trained weights: mean absolute difference by the range of logits, top-1."""

BEGIN, END = "<!-- made of results.json by matrix.py: do not edit -->", "<!-- end -->"

COLUMNS = (
    "model", "format", "compute", "checker", "lint", "certificate", "mean abs / range", "top-1",
    "from the same codes", "codes that differ", "unexplained", "RTX plan",
)  # fmt: skip


def cells() -> Iterator[tuple[str, str, str]]:
    """Family, format, compute."""
    for family in FAMILIES:
        for name in FORMATS:
            yield from ((family, name, compute) for compute in COMPUTE)


def settings(family: str, name: str, compute: str) -> list[str]:
    """The overrides of a cell."""
    layers = dict(FORMATS[name].get("layers", {}))
    if name == "mixed" and family in CONVOLUTIONAL:
        layers["*.0.*"] = {"weights": "int8", "activations": "float"}
    elif name == "mixed" and family in BLOCK:
        layers["*.0.*"] = {"weights": {"bits": 4, "block": BLOCK[family]}, "activations": "float"}
    if name == "ipq":
        books = VECTORS.get(family, {})
        layers |= {one: {"weights": {"codebook": "gather", "block": size}} for one, size in books.items()}
    # what a rounding there does goes straight into the logits
    layers |= {HEADS[family]: {"activations": "float"} if family == "gpt2" else "float"}
    form = {**FORMATS[name], "compute": compute, "layers": layers}
    if family == "gpt2":  # its residual stream has no points
        form.pop("residual", None)
    if family in CONVOLUTIONAL:
        form.pop("attention", None)
    found = [f"format={json.dumps(form)}", f"name={family}-{name}-{compute}"]
    # the bundled GPT-2 has outlying channels: without rescaling, most of its int8 activations are 0 and 1
    rounds = "a16" not in name and name != "ipq"
    return [*found, "adapter=quadapter"] if family == "gpt2" and rounds else found


def float_run(family: str, data: Path, out: Path) -> Path:
    """The float encoder of a family, trained if it was not yet."""
    source = lay_out(data / "models" / "all-MiniLM-L6-v2", family, out / "layouts" / family)
    overrides = [f"model={json.dumps({'family': family, 'source': str(source)})}", f"name=float-{family}"]
    overrides += [f"data.train.table={json.dumps([str(data / CORPUS / 'train.tsv')])}", *tables(data)]
    return api.run(HERE / "float.yaml", out, overrides=overrides, reporter=Reporter()).path


def vision_model(family: str, data: Path, out: Path) -> dict[str, str]:
    """What `model` of a recipe says; trained if it was not yet."""
    source = images.make(family, data, out / "layouts" / family)
    model = {"family": family, "source": str(source)}
    if family in images.PRETRAINED:
        return model
    overrides = [f"model={json.dumps(model)}", f"name=float-{family}", *pictures(data, "train")]
    run = api.run(HERE / "float-images.yaml", out, overrides=overrides, reporter=Reporter()).path
    return {"family": family, "run": str(run)}


def pictures(data: Path, *more: str) -> list[str]:
    """Overrides that name the archive of images."""
    sections = ("calibration", "evaluate.test", *more)
    return [f"data.{section}.npz={json.dumps([str(data / PICTURES)])}" for section in sections]


def tables(data: Path) -> list[str]:
    """Overrides that name the files of CoLA."""
    train, dev = (str(data / CORPUS / f"{part}.tsv") for part in ("train", "dev"))
    return [f"data.calibration.table={json.dumps([train])}", f"data.evaluate.test.table={json.dumps([dev])}"]


def run_cell(
    family: str, name: str, compute: str, data: Path | None, out: Path, *more: str
) -> dict[str, Any]:
    """Run the line on a cell and look at what came out; `more` are overrides."""
    overrides = settings(family, name, compute)
    recipe = HERE / "gpt2.yaml"
    if family in images.FAMILIES:
        recipe = HERE / "images.yaml"
        model = vision_model(family, data, out)
        overrides += [f"model={json.dumps(model)}", *pictures(data)]
    elif family != "gpt2":
        recipe = HERE / "encoder.yaml"
        model = {"family": family, "run": str(float_run(family, data, out))}
        overrides += [f"model={json.dumps(model)}", *tables(data)]
    try:
        made = api.run(recipe, out, overrides=[*overrides, *more], reporter=Reporter())
    except QcompressError as error:
        return {"refused": str(error).splitlines()[-1].strip(), "exit_code": error.exit_code}
    return look(made.path, compute)


def look(run: Path, compute: str) -> dict[str, Any]:
    """What is said of a finished run, measured from its files."""
    file = run / "model.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    findings = onnx_file.lint(file, TARGET)
    (row,) = [row for row in api.load(run).parity["rows"] if row["stage"] == "onnx"]
    distance, engine = row["distance"], read_json(run / "engine" / "build.json")
    mean, top1 = distance["mean_abs"] / distance["range"], distance["top1_agreement"]
    held = row.get("held", {"codes": 0, "differ": 0, "unexplained": 0, "distance": distance})
    far = held["distance"]
    most, least = LIMITS[compute]
    return {
        "lint": sorted({f"{finding.severity}: {finding.rule}" for finding in findings}),
        "certificate": read_json(run / "certificate.json")["complete"],
        "mean_abs": mean,
        "top1": top1,
        "within": mean <= most and top1 >= least,
        "held_mean_abs": far["mean_abs"] / far["range"],
        "held_within": far["mean_abs"] <= most * far["range"] and far["top1_agreement"] >= least,
        **{name: held[name] for name in ("codes", "differ", "unexplained")},
        "engine": engine["status"],
        "plan_bytes": engine["plan"]["bytes"] if engine["plan"] else None,
        "versions": engine["versions"],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The lines of README.md, in the order of the cells."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for cell in cells():
        found = results.get("-".join(cell))
        if found is not None:
            lines.append(f"| {' | '.join(cell)} | {' | '.join(_columns(found))} |")
    missing = sum("-".join(cell) not in results for cell in cells())
    return "\n".join(lines) + (f"\n\nNot measured: {missing} cells." if missing else "")


def _columns(found: dict[str, Any]) -> list[str]:
    if "refused" in found:
        return [f"refused: {found['refused']}", *[""] * (len(COLUMNS) - 4)]
    rounds = found["codes"] > 0
    return [
        "valid",
        ", ".join(found["lint"]) or "clean",
        "complete" if found["certificate"] else "BROKEN",
        f"{found['mean_abs']:.1e}" + ("" if found["within"] else " (over the limit)"),
        f"{found['top1']:.4f}",
        (f"{found['held_mean_abs']:.1e}" + ("" if found["held_within"] else " (over the limit)"))
        if rounds
        else "",
        f"{found['differ']} of {found['codes']:,}" if rounds else "no codes",
        str(found["unexplained"]) if rounds else "",
        f"{found['plan_bytes'] / 2**20:.1f} MiB" if found["plan_bytes"] else found["engine"],
    ]


def rebuild(folder: Path = HERE) -> str:
    """Write the table into README.md; returns it."""
    file = folder / "results.json"
    text = table(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
    readme = folder / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return text


def main() -> None:
    """Read the command line, run, rebuild."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="*", help="glob over <family>-<format>-<compute>")
    parser.add_argument("--table", action="store_true", help="rebuild README.md, run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/matrix"))
    options = parser.parse_args()
    data = Path(os.environ["QCOMPRESS_ASSETS"]) if os.environ.get("QCOMPRESS_ASSETS") else None
    file = HERE / "results.json"
    try:
        for cell in () if options.table else cells():
            if not fnmatch("-".join(cell), options.only):
                continue
            if data is None and cell[0] != "gpt2":
                raise UsageError("weights and data of this family are not here", fix="set QCOMPRESS_ASSETS")
            results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            results["-".join(cell)] = run_cell(*cell, data, options.out.resolve())
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(results.items())]
            file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
            rebuild()
    except QcompressError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(rebuild())


if __name__ == "__main__":
    main()
