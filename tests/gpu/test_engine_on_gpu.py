"""On a machine with a GPU and TensorRT-RTX: the engine row, its speed, and ONNX Runtime's GPU providers.

    python -m pytest -m gpu tests/gpu

TensorRT-RTX builds for the compute capability of this machine where it knows it (not for SM 9.0, Hopper).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lines import CONTEXT, SETS, make_project

from qcompress.parity import gpu
from qcompress.schema.targets import TARGETS
from qcompress.system.artifacts import read_json
from qcompress.system.gpu import compute_capability

pytestmark = pytest.mark.gpu

PROFILES = [{"batch": [1, 2, 4], "sequence": [1, 16, CONTEXT]}, {"batch": [1, 1, 1], "sequence": [1, 32, 32]}]


def own_target() -> str:
    """The RTX target of this machine's GPU."""
    sm = compute_capability()
    if sm is None:
        pytest.skip("no CUDA device")
    found = [name for name, target in TARGETS.items() if target.backend == "tensorrt_rtx" and target.sm == sm]
    if not found:
        pytest.skip(f"TensorRT-RTX builds nothing for SM{sm}")
    return found[0]


@pytest.fixture(scope="module")
def rows(
    tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    build = {"target": own_target(), "profiles": PROFILES}
    project = make_project(tmp_path_factory.mktemp("gpu") / "project", tiny_model, text_file, build=build)
    project.run()
    return {row["stage"]: row for row in read_json(project.latest / "parity.json")["rows"]}


def test_the_engine_row_is_measured_here(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["engine"]
    assert row["status"] == "measured", row["reason"]
    assert row["samples"] == sum(SETS.values())
    # random weights: a rounding that flips changes what follows it
    assert row["distance"]["top1_agreement"] > 0.9
    for name, value in rows["onnx"]["metrics"].items():
        assert row["metrics"][name] == pytest.approx(value, rel=0.02)


def test_the_engine_agrees_with_itself(rows: dict[str, dict[str, Any]]) -> None:
    found = rows["engine"]["measured_on"]["consistency"]
    spread = rows["engine"]["distance"]["range"]
    assert found["repeated_rows_max_abs"] <= 1e-3 * spread
    assert found["batches_max_abs"] <= 0.05 * spread


def test_every_profile_has_its_latency_and_a_cuda_graph(rows: dict[str, dict[str, Any]]) -> None:
    speed = rows["engine"]["measured_on"]["speed"]
    assert [entry["shape"] for entry in speed] == [[2, 16], [1, 32]]
    for entry in speed:
        assert 0 < entry["latency_ms"]["median"] <= entry["latency_ms"]["p99"]
        assert entry["rows_per_s"] > 0
        assert "latency_ms" in entry["cuda_graph"], entry["cuda_graph"]


def test_onnx_runtimes_cuda_provider_gives_the_graphs_numbers(rows: dict[str, dict[str, Any]]) -> None:
    providers = rows["onnx"]["providers"]
    assert providers.keys() <= gpu.PROVIDERS.keys()
    if "cuda" not in providers:
        pytest.skip("this ONNX Runtime was built without CUDA")
    found = providers["cuda"]
    assert found["status"] == "measured", found["reason"]
    assert found["distance"]["top1_agreement"] > 0.9
    for name, value in rows["onnx"]["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=0.02)
