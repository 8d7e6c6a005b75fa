"""Codebook weight quantizers: product quantization with learned centroids (iPQ).

Source: Quant-Noise (arXiv:2004.07320), section 3.3. A weight is cut into vectors of `block` consecutive input
channels of one output channel; k-means gives k centroids, and each vector becomes the index of the nearest:

    W[o, j * block + i] = C[a[o, j], i]        a: uint8, C: [k, block]

Before `settle`, the weight trains as a float parameter; afterwards the indices are fixed and the centroids
train. Indices have the layout of their weight: [out, in / block] for [out, in], [in / block, out] for [in,
out].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.errors import ContractError
from qcompress.quant.affine import Grid, fake_quantize
from qcompress.quant.kmeans import Clusters, kmeans
from qcompress.quant.ranges import TINY
from qcompress.quant.weight_quantizer import CodedWeight
from qcompress.schema.formats import CodebookFormat
from qcompress.schema.quantizers import Codebook

PARTS = ("assignments", "centroids", "scale")
"""Tensors of a trained codebook; only an int8 table has `scale`."""

TABLE = (-127, 127)
"""Code range of an int8 table; symmetric, so that every code can change its sign."""


def to_vectors(weight: Tensor, channel_axis: int, block: int) -> Tensor:
    """Split a weight into vectors: [out, in / block, block], or [in / block, out, block] for an [in, out]
    weight.
    """
    if channel_axis == 0:
        return weight.unflatten(1, (-1, block))
    return weight.unflatten(0, (-1, block)).transpose(1, 2)


def from_vectors(vectors: Tensor, channel_axis: int) -> Tensor:
    """Inverse of `to_vectors`.

    >>> weight = torch.arange(24.0).reshape(4, 6)
    >>> all(from_vectors(to_vectors(weight, axis, 2), axis).equal(weight) for axis in (0, 1))
    True
    """
    return vectors.flatten(1, 2) if channel_axis == 0 else vectors.transpose(1, 2).flatten(0, 1)


class _Decoded(CodedWeight):
    """Base class of codebook weights; the stored tensors are indices and centroids."""

    centroids: Tensor
    assignments: Tensor

    def __init__(self, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.grid, self.bounds = Grid(channel_axis), (0, 255)

    def table(self) -> Tensor:
        """Deployed centroids, [k, block]."""
        raise NotImplementedError

    def decoded(self, assignments: Tensor) -> Tensor:
        """Decode indices to a weight."""
        return from_vectors(F.embedding(assignments.int(), self.table()), self.channel_axis)

    def advance(self) -> None:
        """No-op: an optimizer update cannot leave the valid range."""


class CodebookWeight(_Decoded):
    """Weight quantizer that passes the float weight through until `settle`, then trains the centroids."""

    parameter_roles: ClassVar[dict[str, str]] = {"centroids": "centroid"}

    def __init__(
        self, options: Codebook, form: CodebookFormat, channel_axis: int, shape: torch.Size, estimates: bool
    ) -> None:
        """Create for a weight of `shape`; `estimates`: noise quantizes random parts of it before `settle`."""
        super().__init__(channel_axis)
        self.options, self.form, self.estimates = options, form, estimates
        self.waiting = False
        """True while other layers settle first; the weight then trains as a float."""
        size = list(shape)
        size[1 - channel_axis] //= form.block
        self.centroids = nn.Parameter(torch.zeros(form.centroids, form.block))
        self.register_buffer("assignments", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("settled", torch.tensor(False))
        self.register_buffer("age", torch.tensor(0))
        self.register_buffer("estimated", torch.tensor(-1))

    @property
    def takes_noise(self) -> bool:
        """True before `settle`."""
        return not bool(self.settled)

    def init(self, weight: Tensor) -> None:
        """Settle on this weight; seeded by torch's generator."""
        self.settle(weight)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> Clusters:
        """Run k-means on this weight and fix the indices; afterwards the centroids train. Seeded by torch's
        generator.
        """
        clusters = self._cluster(weight, int(torch.randint(2**62, ())))
        self.settled.fill_(True)
        return clusters

    def _cluster(self, weight: Tensor, seed: int) -> Clusters:
        vectors = to_vectors(weight.detach(), self.channel_axis, self.form.block)
        options, generator = self.options, torch.Generator().manual_seed(seed)
        clusters = kmeans(
            vectors.flatten(0, 1), self.form.centroids, options.iterations, options.splits, generator
        )
        self.centroids.data.copy_(clusters.centroids)
        self.assignments.copy_(clusters.assignments.view_as(self.assignments))
        return clusters

    def scale_of(self, weight: Tensor | None = None) -> Tensor:
        """Scale [] of an int8 table."""
        return (self.centroids.detach().abs().max() / TABLE[1]).clamp_min(TINY)

    def table(self) -> Tensor:
        """Deployed centroids, [k, block]; int8 rounding has a straight-through gradient."""
        centroids = self.centroids
        if self.options.gradient == "mean" and centroids.requires_grad:
            counts = torch.bincount(self.assignments.flatten().int(), minlength=len(centroids))
            centroids = _Averaged.apply(centroids, counts.clamp_min(1)[:, None])
        if self.form.table == "int8":
            centroids = fake_quantize(centroids, self.scale_of(), TABLE)
        return centroids

    def forward(self, weight: Tensor) -> Tensor:
        if bool(self.settled):
            return self.decoded(self.assignments)
        if not self._is_estimated():
            return weight
        return weight + (self._estimate(self.assignments) - weight).detach()

    def of_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Rows of the weight (`CodedWeight.of_rows`)."""
        if bool(self.settled):
            return self.decoded(self.assignments[rows])
        picked = F.embedding(rows, weight)
        if not self._is_estimated():
            return picked
        return picked + (self._estimate(self.assignments[rows]) - picked).detach()

    def _is_estimated(self) -> bool:
        """True if noise rounds the weight to an estimated codebook before `settle`."""
        return self.estimates and not (self.training and self.waiting)

    def _estimate(self, assignments: Tensor) -> Tensor:
        """Weight of these indices. Raises ContractError before the first `refresh`."""
        if int(self.estimated) < 0:
            raise ContractError("a codebook has no estimate yet", fix="call refresh before the pass")
        return self.decoded(assignments)

    @torch.no_grad()
    def refresh(self, weight: Callable[[], Tensor]) -> None:
        """Recompute the codebook of the current weight every `renew` updates, before `settle`. Draws nothing
        from torch's generator, because a pass may be repeated.
        """
        due = int(self.age) // self.options.renew
        if self._is_estimated() and not bool(self.settled) and int(self.estimated) != due:
            self._cluster(weight(), seed=due)
            self.estimated.fill_(due)

    @torch.no_grad()
    def advance(self) -> None:
        """Count one optimizer update."""
        self.age += 1

    @torch.no_grad()
    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """Tensors to store: indices, centroids in fp32, and the scale of an int8 table."""
        parts = {"assignments": self.assignments, "centroids": self.centroids.detach()}
        return parts | ({"scale": self.scale_of()} if self.form.table == "int8" else {})


class FrozenCodebook(_Decoded):
    """Trained codebook with fixed indices and centroids; `scale` [] for an int8 table."""

    def __init__(self, assignments: Tensor, centroids: Tensor, scale: Tensor | None, axis: int) -> None:
        super().__init__(axis)
        self.register_buffer("assignments", assignments)
        self.register_buffer("centroids", centroids)
        self.register_buffer("scale", scale)

    def codes(self) -> Tensor:
        """int8 codes [k, block] of an int8 table."""
        return torch.div(self.centroids, self.scale).round_().clamp_(*TABLE).to(torch.int8)

    def table(self) -> Tensor:
        """Deployed centroids, [k, block]."""
        return self.centroids if self.scale is None else fake_quantize(self.centroids, self.scale, TABLE)

    def scale_of(self, weight: Tensor) -> Tensor:
        """Scale [] of an int8 table."""
        return self.scale

    def codes_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes of the decoded weight and its per-channel scales, which are all equal."""
        codes = from_vectors(self.codes()[self.assignments.int()], self.channel_axis)
        return codes, self.scale.expand(codes.shape[self.channel_axis])

    def forward(self, weight: Tensor) -> Tensor:
        return self.decoded(self.assignments)


class _Averaged(torch.autograd.Function):
    """Identity on the centroids; divides each gradient by the number of vectors assigned to the centroid."""

    @staticmethod
    def forward(ctx, centroids: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return centroids.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return upstream / counts, None


def is_codebook(quantizer: nn.Module) -> bool:
    """True if `quantizer` trains a codebook."""
    return isinstance(quantizer, CodebookWeight)
