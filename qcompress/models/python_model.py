"""A user's module with the inputs and outputs of transformers' image classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput


class ImageModule(nn.Module):
    """A module of images [batch, channels, height, width], as a child named `model`. `example`: its input.

    The logits [batch, labels] are its output, the first of a tuple, or the one named `logits`.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.model = model
        _, channels, height, width = example.shape
        self.config = SimpleNamespace(image_size=(height, width), num_channels=channels)
        self.example = example.detach()
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # its fused form reads weights, and calls no layer

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Logits of images."""
        return ImageClassifierOutput(logits=_logits(self.model(pixel_values)))


def _logits(output: Any) -> Any:
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, list | tuple) and output:
        return output[0]
    return getattr(output, "logits", output)
