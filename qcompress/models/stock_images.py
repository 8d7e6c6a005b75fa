"""Loaders of the families based on `convnet.py`: stock transformers models, and our own.

Torch and transformers are imported inside the functions: the table of families is read without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.errors import ModelError
from qcompress.models.checkpoint_files import read_config
from qcompress.models.convnet import COUNTED, ConvNet
from qcompress.models.loading import complete, hashed_files, reading, stock_config, stock_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SPREAD = 0.02
"""Standard deviation of the weights of a new classifier."""


@dataclass(frozen=True)
class _Images:
    net: ConvNet

    def graph_inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Inputs of the exported graph for images, fp32 [batch, channels, height, width]."""
        return {"pixel_values": pixel_values}

    def tie(self, model: nn.Module) -> None:
        """No-op: no tensors are shared."""

    def _complete(self, model: nn.Module, source: Path, folder: Path, missing: Iterable[str]) -> None:
        """See `loading.complete`; a batch norm's count of batches may be missing."""
        complete(model, source, folder, (name for name in missing if not name.endswith(COUNTED)), SPREAD)


@dataclass(frozen=True)
class StockImages(_Images):
    """Loader of the models of one transformers family."""

    def load_float(self, source: Path, directory: Path | None = None) -> PreTrainedModel:
        """Load the stock model in fp32, in evaluation mode, from safetensors in a local directory.

        `directory` is the load stage's folder: its config.json has the labels, and its float.json the seed of
        a new classifier. Other missing tensors raise ModelError.
        """
        folder = directory or source
        model, loading_info = stock_model(self.net.title, source, folder, stock_config(folder))
        self._complete(model, source, folder, loading_info["missing_keys"])
        return _pooled(model.eval())

    def empty(self, directory: Path) -> PreTrainedModel:
        """Stock model of a config.json with unset weights, to be filled by the caller."""
        import torch
        from transformers import AutoModelForImageClassification

        config = stock_config(directory)
        with (
            torch.device("meta"),
            reading(directory / "config.json", "transformers cannot make a model from it"),
        ):
            model = AutoModelForImageClassification.from_config(config).eval()
        return _pooled(model)

    def install_points(self, model: nn.Module, points: Mapping[str, nn.Module]) -> None:
        """Install quantization points by name; each module receives the activation to quantize."""
        from qcompress.models.image_residual import open_addition

        for name, module in points.items():
            parent, _, child = name.rpartition(".")
            above, _, attribute = parent.rpartition(".")
            opened = open_addition(model.get_submodule(parent))
            setattr(model.get_submodule(above), attribute, opened)
            setattr(opened, child, module)


@dataclass(frozen=True)
class OwnImages(_Images):
    """Loader of the models of `cifar_net.py`."""

    def load_float(self, source: Path, directory: Path | None = None) -> nn.Module:
        """Load the model in fp32, in evaluation mode, from safetensors in a local directory; arguments as
        in `StockImages`.
        """
        from safetensors.torch import load_file

        folder = directory or source
        model = self._made(folder)
        with reading(source, "safetensors cannot read it"):
            files = [load_file(file) for file in hashed_files(source, folder)]
        tensors = {name: value for file in files for name, value in file.items()}
        missing, unknown = model.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()},
            strict=False,
        )
        if unknown:
            raise ModelError(
                f"{source}: the checkpoint has {', '.join(unknown[:3])} ({len(unknown)} tensors in all), "
                f"which a {self.net.family} of this depth does not have",
                fix="write the depth of the checkpoint into config.json",
            )
        self._complete(model, source, folder, missing)
        return model.eval()

    def empty(self, directory: Path) -> nn.Module:
        """Model of a config.json with unset weights, to be filled by the caller."""
        import torch

        with torch.device("meta"):
            return self._made(directory).eval()

    def install_points(self, model: nn.Module, points: Mapping[str, nn.Module]) -> None:
        """Install quantization points by name; each module receives the activation to quantize."""
        for name, module in points.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)

    def _made(self, directory: Path) -> nn.Module:
        from qcompress.models.cifar_net import CifarResNet
        from qcompress.models.cifar_resnet import DEFAULTS, WIDTHS, repeats

        config = read_config(directory)
        labels = len(config.get("id2label") or ()) or _rows(directory, f"{self.net.classifier}.weight")
        return CifarResNet(
            repeats(config), WIDTHS, config.get("num_channels", DEFAULTS["num_channels"]), labels
        )


def _rows(directory: Path, name: str) -> int:
    """Number of rows of a checkpoint's tensor."""
    from qcompress.models.checkpoint_files import read_tensors

    return read_tensors(directory)[name][1][0]


def _pooled(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the model's last pooling by a global one of the same kind (mean or maximum).

    EfficientNet's pooling has a window of `hidden_dim` pixels, far larger than its input, with rounding up;
    runtimes divide by the window's size or by the number of its pixels. The replacement computes torch's
    result, in another order of summation.
    """
    from torch import nn

    body = model.base_model
    if isinstance(body.pooler, nn.AvgPool2d):
        body.pooler = nn.AdaptiveAvgPool2d(1)
    elif isinstance(body.pooler, nn.MaxPool2d):
        body.pooler = nn.AdaptiveMaxPool2d(1)
    return model
