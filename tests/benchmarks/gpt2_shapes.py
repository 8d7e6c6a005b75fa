"""Checkpoints of GPT-2's sizes with random weights, and the line run on one in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from lines import environment
from tiny import make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, logging

SHAPES = {
    "124M": {},
    "355M": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "774M": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
}
CONTEXT = 128
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    folder: Path
    seconds: float
    peak: int
    """Bytes of resident memory, over all processes of the run; what they share counts for each."""

    @property
    def onnx_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("model.onnx*"))

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def make_checkpoint(folder: Path, text: Path, shape: str) -> Path:
    """Random weights as GPT-2 starts with, and a tokenizer of 300 tokens."""
    logging.disable_progress_bar()
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **SHAPES[shape])
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder, text.read_text(encoding="utf-8"))
    return folder


def run_line(folder: Path, checkpoint: Path, text: Path, until: str, **sections: Any) -> Cost:
    """`qcompress run` with observed ranges, `until` a stage; `sections` of the recipe besides."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"text": [str(text)]}
    recipe = {
        "name": "shape",
        "model": {"family": "gpt2", "source": str(checkpoint)},
        "task": {"name": "causal-lm", "context": CONTEXT},
        "data": {"calibration": data | {"limit": 16}, "evaluate": {"test": data | {"limit": 4}}},
        "method": "ptq",
        "build": {"target": "rtx-ada", "profiles": [{"batch": [1, 1, 4], "sequence": [1, CONTEXT, CONTEXT]}]},
        **sections,
    }
    if recipe["method"] == "float":
        recipe["data"]["train"] = data
        recipe["train"] = {"phases": {"finetune": {"steps": 0}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "qcompress", "run", str(folder / "recipe.yaml"), "--until", until]
    began = time.perf_counter()
    log = folder / "log.txt"
    with log.open("w") as file:
        process = psutil.Popen(
            [*command, "--out", str(folder / "runs")],
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(0.05)
    assert process.returncode == 0, log.read_text()
    latest = (folder / "runs" / "shape" / "latest").resolve()
    return Cost(latest, time.perf_counter() - began, peak)


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.Error:  # it ended while it was asked
        pass
    return total
