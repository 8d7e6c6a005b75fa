"""The only module where transformers reads weights and configs: exactly the files that were checked and
hashed.

transformers selects files by itself: a single file before an index, the files in `transformers_weights` or
`configuration_files` of config.json, an adapter, a generation config. This module passes it the tensors of
`weight_files` and the values of `read_config`, and never a directory.

Its exceptions, and those of huggingface_hub, tokenizers and safetensors, become one sentence that names the
checkpoint (`reading`). Torch and transformers are imported inside the functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import ModelError, QcompressError
from qcompress.models.checkpoint_files import read_config, weight_files
from qcompress.models.finite import demand_finite
from qcompress.system.artifacts import read_json
from qcompress.system.collector import paused
from qcompress.system.digests import digest_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

FORMS = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
"""Forms of attentions and experts that torch's exporter translates and calibration sees."""

SHOWN = 300
"""Characters of a library's message that are shown."""


@dataclass(frozen=True)
class reading:  # noqa: N801
    """Context manager in which an exception about the content of `what` becomes a ModelError: "{what}: {task}
    ({exception})".

    Libraries raise any exception, including bare Exception and Rust's panics (a BaseException). Exceptions
    about the machine pass unchanged: memory, packages, the file system, an interrupt.
    """

    what: Path
    task: str
    fix: str = "copy it again from the checkpoint"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not _is_about_content(error):
            return
        text = " ".join(str(error).split())[:SHOWN]
        message = f"{self.what}: {self.task} ({type(error).__name__}: {text})"
        raise ModelError(message, fix=self.fix) from None


def _is_about_content(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno is None  # raised by transformers; the system's errors have a number
    if isinstance(error, RuntimeError) and "alloc" in str(error):
        return False
    if isinstance(error, QcompressError | MemoryError | ImportError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def stock_config(directory: Path) -> PreTrainedConfig:
    """transformers' config of a checkpoint, from the values of its config.json."""
    with paused():
        from transformers import CONFIG_MAPPING

    values = read_config(directory)
    with reading(directory / "config.json", "transformers cannot make a config from it"):
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def hashed_files(source: Path, directory: Path) -> list[Path]:
    """Safetensors files of the checkpoint `source`. Raises ModelError if a file differs from its digest in
    float.json of the load stage's folder `directory`.
    """
    recorded, files = directory / "float.json", weight_files(source)
    digests = read_json(recorded).get("files", {}) if source != directory and recorded.is_file() else {}
    for file in files:
        if digests and digest_of(file) != digests.get(file.name):
            raise ModelError(
                f"{file} was changed after it was hashed, while the run was at work",
                fix="run the recipe again, and leave the checkpoint alone meanwhile",
            )
    return files


def stock_model(
    named: str, source: Path, directory: Path, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model of a transformers class in fp32 with the weights of a checkpoint; also returns
    transformers' report of missing and unexpected tensors. `directory`: see `hashed_files`.
    """
    with paused():
        import transformers
        from safetensors import safe_open
        from transformers import logging

        maker = getattr(transformers, named)
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its warnings list tensors of other heads, and of shared blocks
    try:
        with ExitStack() as stack, reading(source, "transformers cannot make a model from it"):
            files = [
                stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                for file in hashed_files(source, directory)
            ]
            tensors = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
            return maker.from_pretrained(
                None, config=config, state_dict=tensors, dtype="float32", output_loading_info=True, **options
            )
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def complete(
    model: nn.Module, source: Path, directory: Path, missing: Iterable[str], spread: float = 0.0
) -> None:
    """Accept a loaded model: draw its new head and check its values.

    `directory` is the load stage's folder, whose float.json records the tensors and the seed of a new head.
    transformers initializes missing tensors at random. Raises ModelError for `missing` tensors of the
    checkpoint that are not the new head's, and for values that are not finite. `spread`: standard deviation
    of the new head's weights.
    """
    file = directory / "float.json"
    new = json.loads(file.read_text(encoding="utf-8")).get("new_head") if file.is_file() else None
    if absent := sorted(set(missing) - set(new["tensors"] if new else ())):
        raise ModelError(
            f"{source}: the checkpoint lacks {', '.join(absent[:3])} ({len(absent)} tensors in all)",
            fix="take config.json and model.safetensors from the same checkpoint",
        )
    if new:
        draw_weights(model, new["tensors"], new["seed"], spread)
    demand_finite(model, source)


def draw_weights(model: nn.Module, names: list[str], seed: int, spread: float) -> None:
    """Initialize the named tensors from the seed alone: weights from N(0, spread), biases with 0."""
    import torch

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=random) * spread
            parameter.copy_(noise if name.endswith(".weight") else torch.zeros(parameter.shape))
