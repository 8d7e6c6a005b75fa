"""Stage `load`: Recipe -> FloatModel. Finds the checkpoint, refuses what cannot be trusted, records what it
is.

Reads: a directory in transformers' layout, a hub id, or the folder of an earlier `method: float` run.
Writes: float.json, config.json of the task's model, the files that prepare its inputs: a tokenizer's, or an
image processor's. The weights stay where they are, unless the recipe picks blocks of the checkpoint: then
the new model's are copied. No torch.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from qcompress.errors import MachineError, ModelError
from qcompress.models import FAMILIES, PROCESSOR, chosen, describe, renamed_tensors
from qcompress.models.architecture import CAUSAL_LM, Head
from qcompress.models.checkpoint_files import ADAPTER, copy_tensors, read_config, read_tensors, weight_files
from qcompress.models.readers import READER_FILES, WHOLE_PROCESSOR, check_reader
from qcompress.schema.recipe import Model
from qcompress.system.artifacts import write_json
from qcompress.system.digests import digest_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

DOWNLOADED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", *READER_FILES, ADAPTER, WHOLE_PROCESSOR
)  # fmt: skip
"""Files of a checkpoint on the hub that are read; an adapter only to be refused, as in a local folder."""


def locate(model: Model, base: Path) -> Path:
    """The directory of the checkpoint on this machine; a hub id is downloaded (or found in the hub's
    cache).
    """
    if model.run is not None:
        directory = base / model.run
        if not (directory / "verdict.json").is_file():
            raise ModelError(
                f"model.run: {directory} is not a finished run",
                fix="name the run directory that `qcompress run` printed",
            )
        return directory
    directory = base / model.source
    if directory.is_dir():
        return directory
    if not HUB_ID.fullmatch(model.source):
        raise ModelError(
            f"model.source: {model.source} is neither a directory (looked for {directory}) nor a hub id",
            fix="write a path relative to the recipe, or organisation/name",
        )
    return _download(model.source, model.revision)


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MachineError(
            f"downloading {name} needs huggingface_hub ({error})", fix="pip install 'qcompress[train]'"
        ) from None
    pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    if pinned:
        try:
            return Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=list(DOWNLOADED), local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            pass  # not downloaded yet
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MachineError(
            f"{name} cannot be downloaded: {error}",
            fix="check the name and the network, or name a local directory",
        ) from None


def checkpoint_files(directory: Path) -> dict[str, Path]:
    """Every file that makes the model what it is, by name."""
    files = {file.name: file for file in weight_files(directory)}
    for name in ("config.json", "model.safetensors.index.json", *READER_FILES):
        if (directory / name).is_file():
            files[name] = directory / name
    return files


def fingerprint(directory: Path) -> dict[str, str]:
    """Content digest of every file of the checkpoint."""
    return {name: digest_of(file) for name, file in sorted(checkpoint_files(directory).items())}


def load(
    model: Model, directory: Path, digests: dict[str, str], out: Path, head: Head = CAUSAL_LM, seed: int = 0,
    processor: dict[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """Record the checkpoint in `directory`, whose files have these digests, with the head that a task needs.
    Returns notes for the reader.

    `processor`: a preprocessor_config.json of the recipe's own, in the place of the checkpoint's.

    float.json says which tensors of the head are new and the seed they are drawn with, so that every stage
    and every process draws the same ones; config.json names the task's class and labels.
    """
    architecture = describe(model.family, directory, head, model.blocks)
    config, tensors, names = chosen(model.family, directory, model.blocks)
    own = FAMILIES[model.family].task_config(config, tensors, head)
    for name, file in checkpoint_files(directory).items():
        if name in READER_FILES or name == "config.json":
            shutil.copyfile(file, out / name)
    renamed = renamed_tensors(model.family, read_config(directory), read_tensors(directory))
    if model.blocks is not None or renamed:
        copy_tensors(directory, out / "model.safetensors", names)
    if own != read_config(directory):
        write_json(out / "config.json", own)
    if processor is not None:
        write_json(out / PROCESSOR, processor)
    check_reader(model.family, directory, processor)
    write_json(
        out / "float.json",
        {
            "family": model.family,
            "files": digests,
            "parameters": architecture.parameters,
            "new_head": {"seed": seed, "tensors": list(architecture.new_head)}
            if architecture.new_head
            else None,
        },
    )
    if not renamed:
        return []
    old, new = next(iter(renamed.items()))
    return [f"load: {len(renamed)} tensors have other names in the model, such as {old}: {new}"]
