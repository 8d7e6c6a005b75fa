"""Child process of `python_source.py`: calls the user's function, and writes the checkpoint of its module."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import ModelError, QcompressError
from qcompress.models.loading import reading
from qcompress.models.python_source import IMAGES, PYTHON, RETURNS, called, own_values

if TYPE_CHECKING:
    from torch import Tensor

    from qcompress.models.python_model import UserModule

ELEMENTS = ("float32", "int64", "int32", "bool")
"""Types of a graph's inputs."""


def write_checkpoint(path: Path, function: str, kind: str, out: Path) -> None:
    """Write config.json and model.safetensors of the module that the function makes."""
    import torch
    from safetensors.torch import save_file

    module, files = called(path, function, kind)
    with torch.no_grad():
        facts = _of_images(module, path) if kind == IMAGES else {}
        described = {} if kind == IMAGES else _of_any(module, path)
    config = {
        "model_type": PYTHON,
        "architectures": [type(module.model).__name__],
        **facts,
        PYTHON: {"file": str(path), "function": function, "kind": kind, "files": files, **described},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: value.detach().clone().contiguous() for name, value in own_values(module).items()},
        out / "model.safetensors", {"format": "pt"},
    )  # fmt: skip


def _of_images(module: UserModule, path: Path) -> dict[str, Any]:
    """Size of the images and number of labels, as in the config.json of an image classifier."""
    (pixels,) = module.example.values()
    with reading(path, "the module fails on its example", RETURNS[IMAGES]):
        logits = module(pixels).logits
    shape = list(logits.shape) if hasattr(logits, "shape") else type(logits).__name__
    if not isinstance(shape, list) or len(shape) != 2:
        raise ModelError(
            f"model.python: the module returns {shape}, and images need logits [batch, labels]",
            fix="return the logits, alone, first in a tuple, or as `logits`",
        )
    _, channels, height, width = pixels.shape
    return {
        "image_size": [height, width],
        "num_channels": channels,
        "id2label": {str(label): f"LABEL_{label}" for label in range(shape[1])},
    }


def _of_any(module: UserModule, path: Path) -> dict[str, Any]:
    """Inputs and outputs of a module: names, shapes of one sample, types, magnitudes of outputs."""
    import torch

    example = module.example
    for name, tensor in example.items():
        element = str(tensor.dtype).removeprefix("torch.")
        if element not in ELEMENTS:
            raise ModelError(
                f"model.python: the input {name} is {element}, and a graph's is one of {', '.join(ELEMENTS)}",
                fix=f"cast it inside `forward`, and give {name} as float32 or int64",
            )
        if name.startswith("labels"):
            raise ModelError(
                f"model.python: the input {name} has a name of the labels", fix="rename the argument"
            )
    outputs = _outputs(module, example, path)
    twice = _outputs(module, {name: torch.cat([tensor, tensor]) for name, tensor in example.items()}, path)
    for name, tensor in outputs.items():
        again = twice.get(name)
        wanted = (2 * len(tensor), *tensor.shape[1:]) if tensor.dim() else ()
        if again is None or tuple(again.shape) != wanted or not tensor.dim():
            found = "none" if again is None else list(again.shape)
            raise ModelError(
                f"model.python: {name} is {list(tensor.shape)}, and {found} with each input twice: its first "
                "axis is not the batch",
                fix="give every input and output a first axis for the batch",
            )
        if name in example:
            raise ModelError(
                f"model.python: an input and an output are both named {name}",
                fix="return a dict with other names",
            )
    return {
        "inputs": [
            {"name": name, "shape": list(tensor.shape[1:]), "element": str(tensor.dtype).split(".")[1]}
            for name, tensor in example.items()
        ],
        "outputs": [
            {"name": name, "shape": list(tensor.shape[1:]), "scale": _magnitude(tensor)}
            for name, tensor in outputs.items()
        ],
    }


def _outputs(module: UserModule, inputs: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    from qcompress.models.python_model import named_tensors

    with reading(path, "the module fails on its example", RETURNS["any"]):
        output = module.model(**inputs)
    outputs = dict(named_tensors(output))
    if not outputs:
        raise ModelError("model.python: the module returns no tensor", fix="return its outputs")
    return outputs


def _magnitude(tensor: Tensor) -> float:
    """Largest magnitude; 1 for zeros."""
    most = float(tensor.double().abs().max()) if tensor.numel() else 0.0
    return most if 0 < most < float("inf") else 1.0


def main() -> int:
    """Child process: arguments FILE FUNCTION KIND FOLDER; an error is two lines on standard output."""
    answer, sys.stdout = sys.stdout, sys.stderr
    path, function, kind, out = sys.argv[1:]
    try:
        write_checkpoint(Path(path), function, kind, Path(out))
    except QcompressError as error:
        print(f"{error.message}\n{error.fix}", file=answer)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
