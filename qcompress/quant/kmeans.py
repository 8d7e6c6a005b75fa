"""k-means (Lloyd's algorithm) for product quantization: vectors [n, d] to k centroids.

Source: iPQ (Quant-Noise, arXiv:2004.07320, section 3.2) after "And the bit goes down" (arXiv:1907.05686,
section 3): centroids start at k random vectors, each iteration assigns every vector to its nearest centroid
and moves each centroid to the mean of its vectors. A cluster without vectors is refilled by splitting the
fullest one: it takes over that cluster's farthest member, so that the objective does not rise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import torch
from torch import Tensor

from qcompress.errors import ModelError

CHUNK = 2**26
"""Number of distances in one chunk on a GPU."""

ROWS = {"cpu": 2**13, "cuda": 2**22}
"""Number of vectors summed in one chunk: intermediate results fit a core's cache, or a GPU's memory."""


@dataclass(frozen=True)
class Clusters:
    """Result of k-means."""

    centroids: Tensor
    """[k, d]; 0 for clusters without vectors."""
    assignments: Tensor
    """Index of each vector's centroid, [n], uint8."""
    objective: float
    """Mean squared distance of a vector to its centroid; further iterations increase it by rounding alone."""
    empty: int
    """Number of clusters without vectors, because there are fewer distinct vectors than centroids."""
    splits: int
    """Number of clusters that were split to fill an empty one."""


@torch.no_grad()
def kmeans(vectors: Tensor, k: int, iterations: int, splits: int, generator: torch.Generator) -> Clusters:
    """Run k-means on `vectors` [n, d] for `iterations` rounds, with at most `splits` refills in each;
    `generator` (on the CPU) draws the initial vectors.

    Raises ModelError for vectors whose squared distances are not finite: training has diverged, and faiss
    would terminate the process.
    """
    vectors = vectors.float().contiguous()
    if not bool((4 * vectors.square().sum(1)).isfinite().all()):
        raise ModelError(
            "k-means was given weights that are not finite, or too large to be squared",
            fix="lower the learning rates under train.lr",
        )
    start = torch.randperm(len(vectors), generator=generator)[:k].to(vectors.device)
    centroids = vectors.new_zeros(k, vectors.shape[1])
    centroids[: len(start)] = vectors[start]
    alive = torch.arange(k, device=vectors.device) < len(start)
    split = 0
    for _ in range(iterations):
        assigned = nearest(vectors, centroids, alive)
        for _ in range(splits):
            filled = _refill(vectors, centroids, alive, assigned)
            if not filled:
                break
            split += filled
            assigned = nearest(vectors, centroids, alive)
        counts = torch.bincount(assigned, minlength=k)
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=vectors.device)
        for part, index in _parts(vectors, assigned):
            sums.index_add_(0, index, part.double())
        centroids, alive = (sums / counts.clamp_min(1)[:, None]).float(), counts > 0
    assigned = nearest(vectors, centroids, alive)
    total = torch.zeros((), dtype=torch.float64, device=vectors.device)
    for part, index in _parts(vectors, assigned):
        total += _distances(part, centroids, index).sum()
    used = torch.bincount(assigned, minlength=k) > 0
    centroids = torch.where(used[:, None], centroids, torch.zeros_like(centroids))
    objective, empty = float(total) / len(vectors), int((~used).sum())
    return Clusters(centroids, assigned.to(torch.uint8), objective, empty, split)


def nearest(vectors: Tensor, centroids: Tensor, alive: Tensor) -> Tensor:
    """Index of the nearest live centroid, [n]."""
    return (_by_faiss if vectors.device.type == "cpu" else _by_torch)(vectors, centroids, alive)


def _by_faiss(vectors: Tensor, centroids: Tensor, alive: Tensor) -> Tensor:
    """Search on all cores, two to three times as fast as torch."""
    live = alive.nonzero().flatten()
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(centroids[live].numpy())
    _, neighbours = index.search(vectors.numpy(), 1)
    return live.index_select(0, torch.from_numpy(neighbours[:, 0]))


def _by_torch(vectors: Tensor, centroids: Tensor, alive: Tensor) -> Tensor:
    # |x - c|^2 = |x|^2 + (|c|^2 - 2 x.c); the first term does not depend on c
    offsets = centroids.square().sum(1).masked_fill(~alive, torch.inf)
    rows = max(1, CHUNK // len(centroids))
    nearest_of_part = [
        torch.addmm(offsets, part, centroids.t(), alpha=-2).argmin(1) for part in vectors.split(rows)
    ]
    return torch.cat(nearest_of_part)


def _distances(vectors: Tensor, centroids: Tensor, assigned: Tensor) -> Tensor:
    """Squared distance of each vector to its centroid, [n]. faiss computes differences of large numbers,
    which are not 0 for equal vectors.
    """
    return centroids.index_select(0, assigned).sub_(vectors).square_().sum(1)


def _parts(vectors: Tensor, assigned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = ROWS[vectors.device.type]
    return zip(vectors.split(rows), assigned.split(rows), strict=True)


def _refill(vectors: Tensor, centroids: Tensor, alive: Tensor, assigned: Tensor) -> int:
    """Move the centroid of each empty cluster to the farthest member of one of the fullest clusters, in
    place; returns the number of refilled clusters. A cluster of equal vectors cannot be split.
    """
    k = len(centroids)
    counts = torch.bincount(assigned, minlength=k)
    empty = (counts == 0).nonzero().flatten()
    if not len(empty):
        return 0
    distances = _distances(vectors, centroids, assigned)
    farthest = torch.zeros(k, device=vectors.device).scatter_reduce(0, assigned, distances, "amax")
    fullest = counts.masked_fill(farthest <= 0, 0).argsort(descending=True, stable=True)[: len(empty)]
    filled = 0
    for cluster, source in zip(empty.tolist(), fullest.tolist(), strict=True):
        if counts[source] < 2 or farthest[source] <= 0:
            break
        member = torch.where(assigned == source, distances, -torch.ones_like(distances)).argmax()
        centroids[cluster], alive[cluster] = vectors[member], True
        filled += 1
    return filled
