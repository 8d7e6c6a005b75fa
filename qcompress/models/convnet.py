"""What the families of convolutional nets share: layers from config.json, and a linear classifier. No torch.

Layers, in the order of the forward pass: convolutions (kind "conv"), then the classifier (kind "head", which
takes `format.embeddings` as the heads of other families do). A batch norm behind a quantized convolution is
folded into it (`quant/batchnorm.py`); behind one that stays float it stays as it is. No rescaling site: the
ReLU or SiLU behind a batch norm stands between it and its reader.

Points: the two inputs of each residual addition, `branch_point` and `skip_point`.

A checkpoint is one of the bare model (names without the prefix) or of the classifier; what the classifier
lacks is `new_head`, drawn with the seed that the load stage recorded.
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

TASKS = ("image-classification",)

LINEAR_AXIS = 0
"""Output channels of a linear layer's weight: nn.Linear stores [out, in]."""

CAUSAL = False
"""There are no tokens."""

DEPTH = None
"""Blocks have several shapes, and none stands for another."""

INPUTS = (PIXELS,)
"""Inputs of the exported graph, fp32 [batch, channels, height, width]."""

STATISTICS = ("weight", "bias", "running_mean", "running_var")
"""Tensors of a batch norm that a checkpoint must have; it may count its batches as well."""

COUNTED = "num_batches_tracked"
"""Buffer of a batch norm that no checkpoint needs: it counts batches for an option that nobody here uses."""

COUNTS = ("depths", "num_block_repeats")
"""Keys of config.json that count blocks."""

MOST_BLOCKS = 10_000
"""Residual blocks of a net; the deepest published ones have some hundreds."""

MOST = 2**31
"""No size of a layer reaches it."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class Outline:
    """The convolutions of a net in the making."""

    layers: list[Layer] = field(default_factory=list)
    biased: set[str] = field(default_factory=set)
    """Convolutions with a bias."""
    blocks: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def addition(self, place: str, channels: int, skip_nonnegative: bool) -> None:
        """A residual addition, whose points are children of `place`."""
        self.points.append(Point(f"{place}.branch_point", "residual", channels))
        self.points.append(Point(f"{place}.skip_point", "residual", channels, skip_nonnegative))


@dataclass(frozen=True)
class ConvNet:
    """How one family spells what all of them have."""

    family: str
    title: str
    """Class of the model in transformers, or ours."""
    classifier: str
    embeddings: str
    """Module whose output the first block reads."""
    outline: Callable[[dict[str, Any]], Outline]
    """The convolutions of a config.json; raises ModelError where it makes no sense."""
    width: Callable[[dict[str, Any]], int]
    """Inputs of the classifier."""
    blocks: str
    """Pattern of how the names of a block's tensors begin, without the prefix."""
    size: int | None
    """Height and width of an image where config.json and preprocessing name none; none: they have to."""
    nonnegative: Callable[[dict[str, Any]], bool] = lambda config: False
    """Whether the classifier's inputs are never below 0."""

    def describe(self, config: dict[str, Any], tensors: Tensors, head: Head = CAUSAL_LM) -> Architecture:
        """The architecture of a checkpoint with a classifier; its tensors are checked against it."""
        check_config(config, self.family, TASKS, head)
        outline, found = self.outline(config), _bare(tensors, self.family)
        labels = self.labels(config, tensors, head)
        last = Layer(
            self.classifier, "head", self.width(config), len(labels), nonnegative=self.nonnegative(config)
        )
        names = (f"{last.name}.weight", f"{last.name}.bias")
        expected = _tensors(outline) | {names[0]: last.shape, names[1]: (last.out_features,)}
        new = () if any(name in found for name in names) else names
        whole = {name: found[self._own(name)] for name in expected if self._own(name) in found}
        check_shapes(expected, whole, new)
        own = set(map(self._own, expected))
        check_leftover(name for name in found if name not in own and self._is_in_block(name))
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
        """Names of the logits: those of the task, or else those of config.json."""
        last = _bare(tensors, self.family).get(f"{self.classifier}.weight")
        return labels_of(config, last and last[0], head)

    def task_config(self, config: dict[str, Any], tensors: Tensors, head: Head) -> dict[str, Any]:
        """config.json of the task's model: its class, its labels, and what its loss is."""
        return config_of(config, self.title, self.labels(config, tensors, head), head)

    def signature(self, config: dict[str, Any]) -> tuple[Input, ...]:
        """The graph's input: images of one size, `image_size` of config.json, one number or two."""
        size = config.get("image_size", self.size)
        if size is None:
            raise ModelError(
                "nothing says how large images are: neither config.json nor the preprocessing",
                fix="write `size` with `mean` and `std` under `task`, or `image_size` into config.json",
            )
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return image_inputs(config.get("num_channels", 3), height, width)

    def _is_in_block(self, name: str) -> bool:
        """True for a tensor of a block, of whatever depth; what counts batches apart."""
        return re.match(self.blocks, name) is not None and not name.endswith(COUNTED)

    def _own(self, name: str) -> str:
        return name.removeprefix(f"{self.family}.")


def _bare(tensors: Tensors, family: str) -> dict[str, tuple[int, ...]]:
    """Shapes by names without the prefix."""
    return {name.removeprefix(f"{family}."): shape for name, (_, shape) in tensors.items()}


def _tensors(outline: Outline) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the convolutions and their batch norms are made of."""
    expected: dict[str, tuple[int, ...]] = {}
    for layer in outline.layers:
        expected[f"{layer.name}.weight"] = layer.shape
        if layer.name in outline.biased:
            expected[f"{layer.name}.bias"] = (layer.out_features,)
        if layer.norm:
            expected |= {f"{layer.norm}.{part}": (layer.out_features,) for part in STATISTICS}
    return expected


def integers(config: dict[str, Any], keys: Iterable[str], defaults: dict[str, Any]) -> list[Any]:
    """Values of config.json that are positive integers, or lists of them as their defaults are."""
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
