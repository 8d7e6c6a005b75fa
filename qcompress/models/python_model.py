"""A user's module with the inputs and outputs of transformers' models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput

from qcompress.errors import ModelError


class UserModule(nn.Module):
    """Base of the wrappers, with the module as a child named `model`. `example`: its inputs by name."""

    def __init__(self, model: nn.Module, example: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.example = {name: tensor.detach() for name, tensor in example.items()}
        self.config = SimpleNamespace()
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # its fused form reads weights, and calls no layer


class ImageModule(UserModule):
    """A module of images [batch, channels, height, width].

    The logits [batch, labels] are its output, the first of a tuple, or the one named `logits`.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Tensor]) -> None:
        super().__init__(model, example)
        (pixels,) = example.values()
        _, channels, height, width = pixels.shape
        self.config = SimpleNamespace(image_size=(height, width), num_channels=channels)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Logits of images."""
        return ImageClassifierOutput(logits=_logits(self.model(pixel_values)))


def _logits(output: Any) -> Any:
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, list | tuple) and output:
        return output[0]
    return getattr(output, "logits", output)


@dataclass
class NamedOutputs(ModelOutput):
    """Outputs of an `AnyModule`."""

    logits: Tensor | None = None
    """All outputs side by side, fp32 [batch, values]; what rows of the ladder compare."""
    outputs: dict[str, Tensor] | None = None


class AnyModule(UserModule):
    """A module with any inputs and outputs whose first axis is the batch."""

    def forward(self, **inputs: Tensor) -> NamedOutputs:
        """Outputs by name, and side by side."""
        outputs = dict(named_tensors(self.model(**inputs)))
        return NamedOutputs(logits=_joined(list(outputs.values())), outputs=outputs)


def _joined(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].dtype == torch.float32:
        return tensors[0]  # as it is, so that discovery knows the layer that made it
    wide = [tensor[:, None] if tensor.dim() == 1 else tensor for tensor in tensors]
    return torch.cat([tensor.flatten(1).float() for tensor in wide], dim=1)


def named_tensors(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a forward's output with their names: keys of a mapping or of transformers' ModelOutput,
    numbers in a tuple. Raises ModelError for anything else than tensors, None and containers of them.

    >>> [name for name, _ in named_tensors({"boxes": torch.ones(1), "levels": (torch.ones(1), None)})]
    ['boxes', 'levels_0']
    """
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, part in output.items():
            yield from named_tensors(part, str(key) if name == "output" else f"{name}_{key}")
    elif isinstance(output, list | tuple):
        for place, part in enumerate(output):
            yield from named_tensors(part, f"{name}_{place}")
    elif output is not None:
        raise ModelError(
            f"model.python: the module's {name} is a {type(output).__name__}, and no tensor",
            fix="return tensors, alone, in a tuple or by name in a dict",
        )
