"""Child process of `python_source.py`: calls the user's function, and writes the checkpoint of its module."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qcompress.errors import ModelError, QcompressError
from qcompress.models.loading import reading
from qcompress.models.python_source import PYTHON, RETURNS, called, own_values


def write_checkpoint(path: Path, function: str, out: Path) -> None:
    """Write config.json and model.safetensors of the module that the function makes."""
    import torch
    from safetensors.torch import save_file

    module, files = called(path, function)
    with torch.no_grad(), reading(path, "the module fails on its example", RETURNS):
        logits = module(module.example).logits
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"model.python: the module returns {shape}, and images need logits [batch, labels]",
            fix="return the logits, alone, first in a tuple, or as `logits`",
        )
    _, channels, height, width = module.example.shape
    config = {
        "model_type": PYTHON,
        "architectures": [type(module.model).__name__],
        "image_size": [height, width],
        "num_channels": channels,
        "id2label": {str(label): f"LABEL_{label}" for label in range(logits.shape[1])},
        PYTHON: {"file": str(path), "function": function, "files": files},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: value.detach().clone().contiguous() for name, value in own_values(module).items()},
        out / "model.safetensors", {"format": "pt"},
    )  # fmt: skip


def main() -> int:
    """Child process: arguments FILE FUNCTION FOLDER; an error is two lines on standard output."""
    answer, sys.stdout = sys.stdout, sys.stderr
    path, function, out = sys.argv[1:]
    try:
        write_checkpoint(Path(path), function, Path(out))
    except QcompressError as error:
        print(f"{error.message}\n{error.fix}", file=answer)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
