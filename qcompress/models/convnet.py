"""Base of the families of convolutional nets: layers from config.json, and a linear classifier. No torch.

Layers, in the order of the forward pass: convolutions (kind "conv"), then the classifier (kind "head", which
takes `format.embeddings` like the heads of other families). A batch norm after a quantized convolution is
folded into it (`quant/batchnorm.py`); after a float convolution it is unchanged. No rescaling site: the ReLU
or SiLU after a batch norm separates it from its reader.

Quantization points: the two inputs of each residual addition, `branch_point` and `skip_point`, and those of
each squeeze-and-excite product, `input_point` and `gate_point`.

A checkpoint is one of the bare model (names without the prefix) or of the classifier; missing tensors of the
classifier are `new_head`, drawn with the seed that the load stage recorded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from qcompress.errors import ModelError
from qcompress.models.architecture import (
    CAUSAL_LM,
    PIXELS,
    Architecture,
    Head,
    Input,
    Layer,
    Point,
    image_inputs,
)
from qcompress.models.config_checks import check_config, check_leftover, check_shapes, config_of, labels_of
from qcompress.schema.families import model_type_of

TASKS = ("image-classification",)

CAUSAL = False
"""Images have no tokens."""

DEPTH = None
"""Blocks have several shapes, and cannot replace each other."""

INPUTS = (PIXELS,)
"""Inputs of the exported graph, fp32 [batch, channels, height, width]."""

STATISTICS = ("weight", "bias", "running_mean", "running_var")
"""Tensors of a batch norm that a checkpoint must have; its counter of batches is optional."""

COUNTED = "num_batches_tracked"
"""Buffer of a batch norm that a checkpoint may lack: it counts batches for an option that is not used
here.
"""

COUNTS = ("depths", "num_block_repeats")
"""Keys of config.json that count blocks."""

MOST_BLOCKS = 10_000
"""Upper limit of residual blocks; the deepest published nets have some hundreds."""

MOST = 2**31
"""Upper limit, exclusive, of a layer's size."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class Outline:
    """Convolutions, blocks and points of a net, collected by a family."""

    layers: list[Layer] = field(default_factory=list)
    biased: set[str] = field(default_factory=set)
    """Convolutions with a bias."""
    blocks: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def addition(self, place: str, channels: int, skip_nonnegative: bool) -> None:
        """Add a residual addition, whose points are children of `place`."""
        self.points.append(Point(f"{place}.branch_point", "residual", channels))
        self.points.append(Point(f"{place}.skip_point", "residual", channels, skip_nonnegative))


@dataclass(frozen=True)
class ConvNet:
    """Names and structure of one family."""

    family: str
    title: str
    """Class of the model, in transformers or `cifar_net.py`."""
    classifier: str
    embeddings: str
    """Module whose output the first block reads."""
    outline: Callable[[dict[str, Any]], Outline]
    """Function from config.json to the convolutions; raises ModelError for an invalid config."""
    width: Callable[[dict[str, Any]], int]
    """Function from config.json to the number of inputs of the classifier."""
    blocks: str
    """Pattern of the prefix of a block's tensor names, without the model's prefix."""
    size: int | None
    """Height and width of an image if config.json and preprocessing give none; None: they must give it."""
    nonnegative: Callable[[dict[str, Any]], bool] = lambda config: False
    """Function from config.json to whether the classifier's inputs are never negative."""

    def describe(self, config: dict[str, Any], tensors: Tensors, head: Head = CAUSAL_LM) -> Architecture:
        """Architecture of a checkpoint with a classifier, whose tensors are checked against it."""
        check_config(config, self.family, TASKS, head)
        outline, shapes = self.outline(config), _bare(tensors, self.family)
        labels = self.labels(config, tensors, head)
        last = Layer(
            self.classifier, "head", self.width(config), len(labels), nonnegative=self.nonnegative(config)
        )
        names = (f"{last.name}.weight", f"{last.name}.bias")
        expected = _tensors(outline) | {names[0]: last.shape, names[1]: (last.out_features,)}
        new = () if any(name in shapes for name in names) else names
        present = {name: shapes[self._own(name)] for name in expected if self._own(name) in shapes}
        check_shapes(expected, present, new)
        own = set(map(self._own, expected))
        check_leftover(name for name in shapes if name not in own and self._is_in_block(name))
        return Architecture(
            family=self.family,
            layers=(*outline.layers, last),
            blocks=tuple(outline.blocks),
            sites=(),
            context=1,
            vocabulary=len(labels),
            parameters=sum(math.prod(shape) for name, shape in expected.items() if "running_" not in name),
            points=tuple(outline.points),
            embeddings=self.embeddings,
            new_head=new,
        )

    def labels(self, config: dict[str, Any], tensors: Tensors, head: Head) -> tuple[str, ...]:
        """Names of the logits: the task's, or else those of config.json."""
        last = _bare(tensors, self.family).get(f"{self.classifier}.weight")
        return labels_of(config, last and last[0], head)

    def task_config(self, config: dict[str, Any], tensors: Tensors, head: Head) -> dict[str, Any]:
        """config.json of the task's model: its class, labels and problem type."""
        return config_of(config, self.title, self.labels(config, tensors, head), head)

    def signature(self, config: dict[str, Any]) -> tuple[Input, ...]:
        """The graph's input: images of one size, `image_size` of config.json, one number or two. Raises
        ModelError without a size.
        """
        size = config.get("image_size", self.size)
        if size is None:
            raise ModelError(
                "neither config.json nor the preprocessing gives the size of images",
                fix="write `size` with `mean` and `std` under `task`, or `image_size` into config.json",
            )
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return image_inputs(config.get("num_channels", 3), height, width)

    def _is_in_block(self, name: str) -> bool:
        """True for a tensor of a block at any depth, except a counter of batches."""
        return re.match(self.blocks, name) is not None and not name.endswith(COUNTED)

    def _own(self, name: str) -> str:
        return name.removeprefix(f"{model_type_of(self.family)}.")


def _bare(tensors: Tensors, family: str) -> dict[str, tuple[int, ...]]:
    """Shapes by names without the prefix."""
    prefix = f"{model_type_of(family)}."
    return {name.removeprefix(prefix): shape for name, (_, shape) in tensors.items()}


def _tensors(outline: Outline) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the convolutions and their batch norms."""
    expected: dict[str, tuple[int, ...]] = {}
    for layer in outline.layers:
        expected[f"{layer.name}.weight"] = layer.shape
        if layer.name in outline.biased:
            expected[f"{layer.name}.bias"] = (layer.out_features,)
        if layer.norm:
            expected |= {f"{layer.norm}.{part}": (layer.out_features,) for part in STATISTICS}
    return expected


def divisible(channels: float, divisor: int, least: int) -> int:
    """Round a number of channels to a multiple of the divisor, not below `least`, and by at most 10 % less.

    >>> divisible(35.2, 8, 8), divisible(11.2, 8, 8), divisible(1.6, 8, 4)
    (32, 16, 4)
    """
    multiple = max(least, int(channels + divisor / 2) // divisor * divisor)
    return multiple + divisor if multiple < 0.9 * channels else multiple


def integers(config: dict[str, Any], keys: Iterable[str], defaults: dict[str, Any]) -> list[Any]:
    """Values of config.json that must be positive integers, or lists of them where the default is a list.
    Raises ModelError.
    """
    values = []
    for key in keys:
        value = config.get(key, defaults[key])
        wanted = list if isinstance(defaults[key], list) else int
        items = value if wanted is list and isinstance(value, list) else [value]
        if (
            not isinstance(value, wanted)
            or not items
            or any(type(item) is not int or not 1 <= item < MOST for item in items)
        ):
            kind = "a list of positive integers" if wanted is list else "a positive integer"
            raise ModelError(f"config.json: {key} must be {kind}, found {value!r:.60}")
        if key in COUNTS and sum(items) > MOST_BLOCKS:
            raise ModelError(
                f"config.json: {key} counts {sum(items)} blocks, and at most {MOST_BLOCKS} are read"
            )
        values.append(value)
    return values
