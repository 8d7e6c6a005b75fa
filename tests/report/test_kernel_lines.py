"""Lines of the ladder about kernels, from hand-written sizes.json and parity.json."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from qcompress.report.ladder import engine_kernels, kernels

SHARED = "decoded in each run: 3 nodes read one Q/DQ pair"


def layer(name: str, reason: str | None = None, size: int = 0, table: bool = False) -> dict[str, Any]:
    return {"name": name, "reason": reason, "decoded_bytes": size, "table": table}


SIZES: dict[str, Any] = {
    "kernels": {
        "onnxruntime": {
            "read": True, "reason": None, "version": "1.31.1", "machine": "x86_64",
            "products": 4, "integer": 1, "weight_only": 0, "tables": 1, "codes": 0,
            "decoded_bytes": 12_345, "constant_bytes": 0,
            "layers": [
                layer("wte", "decoded in each run: the table is decoded before Gather", 12_000, table=True),
                layer("h.q", SHARED, 115), layer("h.k", SHARED, 115), layer("h.v", SHARED, 115), layer("h.o"),
            ],
        },
        "engine": {"read": False, "reason": "on its device"},
    }
}  # fmt: skip


def changed(**values: Any) -> dict[str, Any]:
    sizes = copy.deepcopy(SIZES)
    sizes["kernels"]["onnxruntime"] |= values
    return sizes


def test_counts_come_first_and_each_reason_has_one_line_with_its_bytes() -> None:
    assert kernels(SIZES) == [
        "in ONNX Runtime 1.31.1 on x86_64: 1 of 4 quantized layers run as integer kernels, 0 of 1 tables are "
        "looked up as codes, 12,345 bytes of weights are decoded in each run",
        "  wte: decoded in each run: the table is decoded before Gather (12,000 bytes)",
        f"  h.q and 2 more: {SHARED} (345 bytes)",
    ]


def test_weight_only_kernels_and_float_copies_are_counted_if_there_are_any() -> None:
    (line, *_) = kernels(changed(weight_only=3, constant_bytes=4096, tables=0))
    assert "1 of 4 quantized layers run as integer kernels, 3 as weight-only kernels, 12,345 bytes" in line
    assert line.endswith("4,096 bytes are held as floats") and "tables" not in line


def test_a_graph_that_was_not_read_says_why() -> None:
    assert kernels(changed(read=False, reason="onnxruntime is not installed (x)")) == [
        "kernels in ONNX Runtime: not known: onnxruntime is not installed (x)"
    ]


@pytest.mark.parametrize("sizes", [None, [], {}, {"kernels": None}, {"kernels": {}}, changed(layers=[])])
def test_an_older_file_and_a_float_model_have_no_line(sizes: Any) -> None:
    assert kernels(sizes) == []


def test_an_engine_tells_what_its_inspector_counted() -> None:
    def report(answer: Any) -> dict[str, Any]:
        return {"rows": [{"stage": "float"}, {"stage": "engine", "measured_on": {"kernels": answer}}]}

    known = report({"layers": 40, "integer": 36, "names": []})
    assert engine_kernels(known) == ["in the engine: 36 of 40 layers read integers"]
    names_only = report({"layers": 40, "integer": None, "reason": "built without detailed profiling"})
    assert engine_kernels(names_only) == [
        "kernels of the engine: not known: built without detailed profiling"
    ]
    assert engine_kernels(report(None)) == []
    assert engine_kernels({"rows": [{"stage": "engine", "measured_on": None}]}) == []
