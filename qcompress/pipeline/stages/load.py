"""Stage `load`: Recipe -> FloatModel. Locates the checkpoint, refuses untrusted content, records its digests.

Reads: a directory in transformers' layout, a hub id, or the folder of an earlier `method: float` run. Writes:
float.json, config.json of the task's model, and the files of the tokenizer or image processor. The weights
stay in their directory, unless the recipe selects blocks of the checkpoint: then the new model's weights are
copied. No torch.
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
from qcompress.models.pooling import POOLING_FILES, settled_head
from qcompress.models.python_source import ANY, IMAGES, make_checkpoint, refuse_code
from qcompress.models.readers import READER_FILES, WHOLE_PROCESSOR, check_reader
from qcompress.schema.recipe import HUB_ID, Model
from qcompress.system.artifacts import write_json
from qcompress.system.digests import digest_of

DOWNLOADED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", *READER_FILES, *POOLING_FILES, ADAPTER,
    WHOLE_PROCESSOR,
)  # fmt: skip
"""Files of a hub checkpoint that are downloaded; an adapter is downloaded only to be refused, as in a
local directory.
"""


def locate(model: Model, base: Path) -> Path:
    """Directory of the checkpoint on this machine; a hub id is downloaded (or read from the hub's cache).
    Raises ModelError for a source that does not exist.
    """
    if model.run is not None:
        directory = base / model.run
        if not (directory / "verdict.json").is_file():
            raise ModelError(
                f"model.run: {directory} is not a finished run",
                fix="name the run directory that `qcompress run` printed",
            )
        refuse_code(directory, read_config(directory))
        return directory
    if model.python is not None:
        return make_checkpoint(model.python, base, ANY if model.family == "any-model" else IMAGES)
    directory = base / model.source
    if directory.is_dir():
        refuse_code(directory, read_config(directory) if (directory / "config.json").is_file() else {})
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
    """All files that define the model, by name."""
    files = {file.name: file for file in weight_files(directory)}
    for name in ("config.json", "model.safetensors.index.json", *POOLING_FILES, *READER_FILES):
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
    Returns notes for the user.

    `processor`: the recipe's preprocessor_config.json, which replaces the checkpoint's.

    float.json lists the tensors of the head that are new, and the seed that draws them, so that every stage
    and every process draws equal ones; config.json names the task's class and labels.
    """
    architecture = describe(model.family, directory, head, model.blocks)
    config, tensors, names = chosen(model.family, directory, model.blocks)
    task_config = FAMILIES[model.family].task_config(config, tensors, settled_head(head, directory, config))
    for name, file in checkpoint_files(directory).items():
        if name in READER_FILES or name == "config.json":
            shutil.copyfile(file, out / name)
    renamed = renamed_tensors(model.family, read_config(directory), read_tensors(directory))
    if model.blocks is not None or renamed:
        copy_tensors(directory, out / "model.safetensors", names)
    if task_config != read_config(directory):
        write_json(out / "config.json", task_config)
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
