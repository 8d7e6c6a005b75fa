"""Every architecture of configs.py through the whole line, in W8A8 and in W4A16: one line each.

    python recipes/architectures/architectures.py [--only 'causal-lm/*'] [--table]

The models are small and have random weights: the table says that a model is read, quantized, folded,
exported, certified, compared and built, and nothing about its accuracy. Texts and images are made here. What
is measured is kept in results.json, and the table in README.md is made of that alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from configs import ARCHITECTURES, SIDE, VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qcompress import api
from qcompress.errors import QcompressError
from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import Head
from qcompress.models.checkpoint_files import read_config
from qcompress.models.pooling import EmbeddingHead
from qcompress.models.structure.reduced import fill_random
from qcompress.schema.families import DISCOVERED
from qcompress.system.artifacts import read_json
from qcompress.system.reporter import Reporter

HERE = Path(__file__).parent
TARGET = "rtx-ada"
FORMATS = {
    "w8a8": "w8a8",
    "w4a16": {"weights": {"bits": 4, "block": 32}, "activations": "float", "embeddings": "int8"},
}
CONVOLUTIONS_W4A16 = {
    "weights": {"bits": 4, "container": "int8"}, "activations": "float", "embeddings": "int8"
}  # fmt: skip
"""TensorRT takes convolutions of int8 codes alone, with a scale for each output channel."""

AUTOS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}
UNLABELLED = ("causal-lm", "fill-mask", "question-answering")
"""Tasks whose labels are not written into config.json."""

SPECIAL = {"pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>"}
LABELS = ("a", "b", "c")
COLUMNS = (
    "task",
    "architecture",
    "layers",
    "covered",
    "blocks",
    "sites",
    "cache",
    "W8A8",
    "plan",
    "W4A16",
    "plan",
)
BEGIN, END = "<!-- made of results.json by architectures.py: do not edit -->", "<!-- end -->"


def cells() -> Iterator[tuple[str, str]]:
    """Task and architecture."""
    for task, configs in ARCHITECTURES.items():
        yield from ((task, name) for name in configs)


def write_data(folder: Path) -> None:
    """Texts, labelled texts and images; the same in every call."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmno"), random.integers(2, 7))) for _ in range(60)]
    follower = random.permutation(60)
    text, word = [], 0
    for _ in range(4000):
        word = int(follower[word]) if random.random() < 0.8 else int(random.integers(60))
        text.append(words[word])
    (folder / "text.txt").write_text(" ".join(text), encoding="utf-8")
    rows = [f"{' '.join(text[at : at + 8])}\t{LABELS[at % 3]}" for at in range(0, 400, 8)]
    (folder / "texts.tsv").write_text("text\tlabel\n" + "\n".join(rows), encoding="utf-8")
    places = [(text[at : at + 12], text[at + 12 : at + 15]) for at in range(0, 600, 15)]
    asked = [f"{' '.join(words)}\t{' '.join(question)}\t{words[5]}" for words, question in places]
    (folder / "questions.tsv").write_text("context\tquestion\tanswers\n" + "\n".join(asked), encoding="utf-8")
    images = random.integers(0, 256, (32, 64, 64, 3), np.uint8)
    np.savez(folder / "images.npz", image=images, label=np.arange(32) % 3)


def write_model(task: str, name: str, folder: Path) -> Path:
    """Random checkpoint of an architecture, with a tokenizer if it reads text."""
    labels = {} if task in UNLABELLED else {
        "id2label": dict(enumerate(LABELS)), "label2id": {label: at for at, label in enumerate(LABELS)}
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(name, architectures=[], **ARCHITECTURES[task][name], **labels)
    model = getattr(transformers, AUTOS[task]).from_config(config).eval()
    fill_random(model, seed=3)
    model.save_pretrained(folder)
    if task != "image-classification":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=alphabet,
            special_tokens=[*SPECIAL.values()],
            show_progress=False,
        )
        tokenizer.train_from_iterator([(folder.parent / "text.txt").read_text()], trainer)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
        fast.save_pretrained(folder)
    return folder


def recipe_of(task: str, name: str, form: str, model: Path) -> dict[str, Any]:
    """Recipe of a cell; calibration is the only training."""
    if task in ("causal-lm", "fill-mask"):
        source, options = {"text": ["text.txt"]}, {"context": 24}
    elif task == "question-answering":
        source, options = {"table": ["questions.tsv"]}, {"context": 24, "stride": 4}
    elif task == "image-classification":
        source, options = {"npz": ["images.npz"], "columns": {"image": "image", "label": "label"}}, {}
        side = ARCHITECTURES[task][name].get("image_size", SIDE)
        options = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [side, side]}
    else:
        pooled = task == "feature-extraction"
        columns = {"text": "text"} if pooled else {"text": "text", "label": "label"}
        source = {"table": ["texts.tsv"], "columns": columns}
        options = {"pooling": "mean", "normalize": True} if pooled else {}
    convolves = task == "image-classification" or name == "nystromformer"
    length = {} if task == "image-classification" else {"sequence": [1, 16, 24]}
    return {
        "name": f"{name.replace('_', '-')}-{form}",
        "model": {"source": str(model)},
        "task": {"name": task, **options},
        "data": {"calibration": {**source, "limit": 8}, "evaluate": {"test": {**source, "limit": 16}}},
        "format": CONVOLUTIONS_W4A16 if convolves and form == "w4a16" else FORMATS[form],
        "method": "ptq",
        "build": {"target": TARGET, "profiles": [{"batch": [1, 2, 4], **length}]},
        "verify": {"held": "always", "batch_size": 4},
    }


def run_cell(task: str, name: str, out: Path) -> dict[str, Any]:
    """Run both formats of an architecture."""
    folder = out / task
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    model = write_model(task, name, folder / name)
    try:
        architecture = describe(DISCOVERED[task], model, _head(task))
    except QcompressError as error:
        return {"refused": error.message}
    found = {
        "layers": len(architecture.layers), "covered": architecture.covered,
        "blocks": len(architecture.blocks), "sites": len(architecture.sites),
        "cache": _has_cache(task, model),
    }  # fmt: skip
    for form in FORMATS:
        file = folder / f"{name}-{form}.yaml"
        file.write_text(yaml.safe_dump(recipe_of(task, name, form, model)), encoding="utf-8")
        try:
            found[form] = look(api.run(file, out / "runs", reporter=Reporter(silent=True)).path)
        except QcompressError as error:
            found[form] = {"refused": str(error).splitlines()[-1].strip()}
        except torch.onnx.OnnxExporterError as error:
            found[form] = {"refused": f"torch's exporter: {str(error).partition('.')[0]}"}
    return found


def _head(task: str) -> Head:
    return EmbeddingHead(task, pooling="mean", normalize=True) if task == "feature-extraction" else Head(task)


def _has_cache(task: str, model: Path) -> bool:
    if task != "causal-lm":
        return False
    try:
        return FAMILIES[DISCOVERED[task]].cache_layout(read_config(model)) is not None
    except QcompressError:
        return False


def look(run: Path) -> dict[str, Any]:
    """Measurements of a finished run, from its files."""
    rows = {row["stage"]: row for row in read_json(run / "parity.json")["rows"]}
    folded, graph = rows["folded"], rows["onnx"]
    held = graph.get("held") or {"distance": graph["distance"], "unexplained": 0, "codes": 0}
    forced = folded.get("held") or {"distance": folded["distance"], "unexplained": 0}
    engine = read_json(run / "engine" / "build.json")
    return {
        "verdict": read_json(run / "verdict.json")["verdict"],
        "certificate": read_json(run / "certificate.json")["complete"],
        "fold": _share(forced["distance"]),
        "graph": _share(graph["distance"]),
        "held": _share(held["distance"]),
        "unexplained": held["unexplained"] + forced["unexplained"],
        "engine": engine["status"],
        "plan_bytes": engine["plan"]["bytes"] if engine["plan"] else None,
    }


def _share(distance: dict[str, Any]) -> float:
    return distance["mean_abs"] / distance["range"] if distance["range"] else 0.0


def table(results: dict[str, dict[str, Any]]) -> str:
    """The lines of README.md, in the order of the cells."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for task, name in cells():
        found = results.get(f"{task}/{name}")
        if found is not None:
            lines.append(f"| {task} | {name} | {' | '.join(_columns(found))} |")
    missing = sum(f"{task}/{name}" not in results for task, name in cells())
    return "\n".join(lines) + (f"\n\nNot measured: {missing}." if missing else "")


def _columns(found: dict[str, Any]) -> list[str]:
    if "refused" in found:
        return [f"refused: {found['refused']}", *[""] * (len(COLUMNS) - 3)]
    facts = [
        str(found["layers"]),
        f"{100 * found['covered']:.0f} %",
        str(found["blocks"]),
        str(found["sites"]),
    ]
    facts.append("yes" if found["cache"] else "")
    for form in FORMATS:
        cell = found[form]
        if "refused" in cell:
            facts += [f"refused: {cell['refused'][:80]}", ""]
            continue
        broken = "" if cell["certificate"] and not cell["unexplained"] else " BROKEN"
        facts.append(f"{cell['verdict']}, {cell['held']:.0e} ({cell['graph']:.0e}){broken}")
        facts.append(f"{cell['plan_bytes'] / 2**20:.1f} MiB" if cell["plan_bytes"] else cell["engine"])
    return facts


def rebuild(folder: Path = HERE) -> str:
    """Write the table into README.md; returns it."""
    file, readme = folder / "results.json", folder / "README.md"
    text = table(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return text


def main() -> None:
    """Read the command line, run, rebuild."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="*", help="glob over <task>/<architecture>")
    parser.add_argument("--table", action="store_true", help="rebuild README.md, run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/architectures"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    file = HERE / "results.json"
    for task, name in () if options.table else cells():
        if fnmatch(f"{task}/{name}", options.only):
            results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            results[f"{task}/{name}"] = run_cell(task, name, options.out.resolve())
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(results.items())]
            file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
            print(task, name, " | ".join(_columns(results[f"{task}/{name}"])), flush=True)
    print(rebuild())


if __name__ == "__main__":
    main()
