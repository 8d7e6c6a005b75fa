"""Structures of models by their config.json: discovered once, kept in a cache, read without torch afterwards.

An entry of the cache is keyed by the config, the versions of torch and transformers, and the code of
discovery. Without an entry a child process discovers, so that `check` does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcompress.errors import MachineError, ModelError
from qcompress.models.architecture import CacheLayout
from qcompress.models.kept_folder import cache_folder
from qcompress.models.python_source import ANY
from qcompress.models.structure.structure import Structure
from qcompress.system.child_process import command, environment

UNREAD = (
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id",
    "task_specific_params", "use_cache", "auto_map",
)  # fmt: skip
"""Keys of config.json on which a structure does not depend."""


@dataclass(frozen=True)
class Discovered:
    """A structure, and the facts for which a model has to be made."""

    structure: Structure
    tensors: dict[str, tuple[int, ...]]
    """Parameters and their shapes; tied ones once."""
    ties: tuple[tuple[str, str], ...]
    """Names of parameters that share a tensor: the first one and another."""
    title: str
    """Class of the model in transformers."""
    arguments: tuple[str, ...]
    """Inputs that the forward pass takes and uses, of those that a graph may have."""
    prefix: str
    """Prefix of the base model's parameters with its dot; a checkpoint of the base model lacks it."""
    renames: tuple[tuple[str, str], ...]
    """Patterns of names in checkpoints and their replacements in the model (transformers' WeightRenaming)."""
    converts: bool
    """True if transformers also splits or joins tensors of checkpoints."""
    cache: CacheLayout | None = None
    """Of a decoder whose keys and values all have one shape."""

    def name(self, stored: str) -> str:
        """Name in the model of a checkpoint's tensor."""
        for source, target in self.renames:
            stored = re.sub(source, target, stored)
        return stored

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        cache = self.cache and vars(self.cache)
        return {**vars(self), "structure": self.structure.to_json(), "cache": cache}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Discovered:
        """Read what `to_json` wrote."""
        layout = value["cache"]
        return cls(
            structure=Structure.from_json(value["structure"]),
            tensors={name: tuple(shape) for name, shape in value["tensors"].items()},
            ties=tuple((first, other) for first, other in value["ties"]),
            title=value["title"],
            arguments=tuple(value["arguments"]),
            prefix=value["prefix"],
            renames=tuple((source, target) for source, target in value["renames"]),
            converts=value["converts"],
            cache=layout and CacheLayout(tuple(layout["attentions"]), layout["heads"], layout["width"]),
        )


_READ: dict[str, Discovered] = {}
"""Structures that this process has read."""


def structure_of(auto: str, values: dict[str, Any]) -> Discovered:
    """Structure of the model that transformers' class `auto` makes of the values of a config.json.

    Raises ModelError for a config of which it makes none, and MachineError (exit code 6) if torch is missing
    and no structure is kept.
    """
    labels = values.get("id2label")
    values = {key: value for key, value in values.items() if key not in UNREAD}
    values |= {"num_labels": len(labels)} if isinstance(labels, dict) and labels else {}
    text = json.dumps([auto, values], sort_keys=True)
    if text not in _READ:
        file = _file(text)
        kept = _kept(file)
        if kept is None:
            kept = discovered(text) if "torch" in sys.modules else _in_child(text)
            _keep(file, kept)
        _READ[text] = Discovered.from_json(kept)
    return _READ[text]


def discovered(text: str) -> dict[str, Any]:
    """Discover in this process; leaves torch's random state as it is."""
    import torch

    from qcompress.models.structure.whole import (
        image_inputs,
        inputs_like_example,
        text_inputs,
        whole_structure,
    )

    auto, values = json.loads(text)
    inputs = inputs_like_example if auto == ANY else image_inputs if "Image" in auto else text_inputs
    with torch.random.fork_rng(devices=()):
        return json.loads(json.dumps(whole_structure(auto, values, inputs).to_json()))


def _file(text: str) -> Path:
    """Entry of the cache: its name is the digest of the config, the versions and the code."""
    sources = [*Path(__file__).parent.glob("*.py"), Path(__file__).parents[1] / "architecture.py"]
    parts = [text, *(f"{name} {_version(name)}" for name in ("torch", "transformers", "accelerate"))]
    parts += [source.read_text(encoding="utf-8") for source in sorted(sources)]
    return cache_folder() / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _kept(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _keep(file: Path, kept: dict[str, Any]) -> None:
    """Write an entry; without a writable folder each process discovers for itself."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
            json.dump(kept, new)
        os.replace(new.name, file)
    except OSError:
        return


def _in_child(text: str) -> dict[str, Any]:
    """Discover in a child process."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise MachineError(
            "the structure of this model is not known, and discovering it needs torch and transformers",
            fix="pip install 'qcompress[train]', or copy "
            f"{cache_folder()} from a machine where `qcompress check` of this recipe ran",
        )
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(
            command("qcompress.models.structure"), input=text, capture_output=True, text=True, cwd=folder,
            env=environment(),
        )  # fmt: skip
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        answer = {"error": f"discovery ended with code {child.returncode}: {child.stderr.strip()[-300:]}"}
    if "error" in answer:
        raise ModelError(answer["error"], fix=answer.get("fix", ""))
    return answer
