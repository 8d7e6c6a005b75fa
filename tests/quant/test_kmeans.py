"""k-means against scikit-learn: the objective never rises, and empty clusters are refilled."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from qcompress.errors import ModelError
from qcompress.quant import kmeans as module
from qcompress.quant.kmeans import kmeans


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(count: int = 4000, width: int = 8) -> Tensor:
    return torch.randn(count, width, generator=seeded(1))


def objective(x: Tensor, centroids: Tensor, assignments: Tensor) -> float:
    return float((x - centroids[assignments.long()]).double().square().sum(1).mean())


def test_the_objective_never_rises_and_is_that_of_what_is_returned() -> None:
    x = vectors()
    steps = [kmeans(x, 64, iterations, 100, seeded()).objective for iterations in range(1, 16)]
    assert all(after < before for before, after in zip(steps, steps[1:], strict=False))
    found = kmeans(x, 64, 15, 100, seeded())
    assert found.objective == steps[-1]
    assert objective(x, found.centroids, found.assignments) == pytest.approx(found.objective, rel=1e-6)
    nearest = torch.cdist(x, found.centroids).argmin(1)
    assert (nearest == found.assignments.long()).float().mean() > 0.999


def test_it_is_as_good_as_scikit_learns_from_starts_of_the_same_kind() -> None:
    x = vectors()
    ours = [kmeans(x, 64, 15, 100, seeded(seed)).objective for seed in range(3)]
    theirs = [
        KMeans(64, init="random", n_init=1, max_iter=15, algorithm="lloyd", random_state=seed)
        .fit(x.numpy()).inertia_ / len(x)
        for seed in range(3)
    ]  # fmt: skip
    assert sum(ours) <= 1.02 * sum(theirs)


@pytest.mark.parametrize("distinct", [1, 5, 16])
def test_as_many_vectors_as_centroids_are_stored_exactly_and_unused_centroids_counted(distinct: int) -> None:
    points = vectors(distinct, 4)
    x = points[torch.randint(distinct, (500,), generator=seeded(2))]
    found = kmeans(x, 16, 15, 100, seeded())
    assert torch.equal(found.centroids[found.assignments.long()], x)
    assert found.empty == 16 - len(x.unique(dim=0))
    assert found.assignments.dtype == torch.uint8 and int(found.assignments.max()) < 16


def test_an_empty_cluster_takes_over_a_part_of_the_fullest_one() -> None:
    """Most starting vectors are equal, so that most clusters begin empty."""
    x = torch.cat([torch.zeros(3000, 4), vectors(1000, 4)])
    found = kmeans(x, 32, 15, 100, seeded())
    assert found.splits > 10 and found.empty == 0
    assert len(found.assignments.unique()) == 32
    unrefilled = kmeans(x, 32, 15, 0, seeded())
    assert unrefilled.splits == 0 and unrefilled.empty > 10
    assert found.objective < 0.8 * unrefilled.objective


def test_fewer_vectors_than_centroids() -> None:
    x = vectors(10, 4)
    found = kmeans(x, 16, 5, 100, seeded())
    assert torch.equal(found.centroids[found.assignments.long()], x) and found.empty == 6


def test_what_a_gpu_computes_is_what_a_cpu_does() -> None:
    x = vectors(3000)
    centroids, alive = vectors(32), torch.arange(32) % 5 != 0
    by_faiss, by_torch = (find(x, centroids, alive) for find in (module._by_faiss, module._by_torch))
    assert (by_faiss == by_torch).float().mean() > 0.999
    apart = [(x - centroids[found]).square().sum(1) for found in (by_faiss, by_torch)]
    torch.testing.assert_close(*apart)
    assert alive[by_faiss].all() and alive[by_torch].all()


def test_another_seed_finds_other_centroids_and_the_same_seed_the_same() -> None:
    x = vectors()
    first, again, other = (kmeans(x, 16, 3, 100, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.centroids, again.centroids) and torch.equal(first.assignments, again.assignments)
    assert not torch.equal(first.centroids, other.centroids)


def test_clusters_of_equal_vectors_are_not_split_again_and_again() -> None:
    """Distances of equal vectors are 0, whatever searches for them: a difference of large numbers is not."""
    x = 50 * vectors(20, 8)[torch.randint(20, (5000,), generator=seeded(3))]
    found = kmeans(x, 64, 15, 100, seeded())
    assert found.objective == 0 and found.splits < 20 and found.empty == 64 - len(x.unique(dim=0))


@pytest.mark.parametrize("iterations", [1, 15])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e20, 1e19])
def test_weights_that_have_diverged_are_an_error_and_not_the_end_of_the_process(
    value: float, iterations: int
) -> None:
    x = vectors()
    x[5, 3] = value
    with pytest.raises(ModelError, match="not finite"):
        kmeans(x, 64, iterations, 100, seeded())
    x[5, 3] = 1e18  # as large as squares allow
    assert kmeans(x, 64, iterations, 100, seeded()).empty == 0
