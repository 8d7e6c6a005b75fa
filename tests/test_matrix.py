"""Every family in every format (recipes/matrix): one cell, all of them slowly, and the table."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModel, logging

from qcompress.models import FAMILIES as KNOWN
from qcompress.schema.families import DISCOVERED

MATRIX = Path(__file__).parent.parent / "recipes" / "matrix"
ASSETS = Path(os.environ["QCOMPRESS_ASSETS"]) if os.environ.get("QCOMPRESS_ASSETS") else None

needs_assets = pytest.mark.skipif(ASSETS is None, reason="QCOMPRESS_ASSETS is not set")
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

CELLS = [
    (family, name, compute)
    for family in (
        "gpt2",
        "bert",
        "roberta",
        "distilbert",
        "vit",
        "cifar-resnet",
        "resnet",
        "efficientnet",
        "mobilenet-v2",
    )
    for name in (
        "w8a8",
        "w8a8-points",
        "w8a16",
        "w4a16-g32",
        "w4a16-g64",
        "w4a16-g128",
        "w4a8",
        "mixed",
        "ipq",
    )
    for compute in ("fp32", "fp16")
]
QUICK = [
    ("gpt2", "mixed", "fp32"),
    pytest.param(("cifar-resnet", "w8a8", "fp16"), marks=[needs_assets, pytest.mark.slow]),
]
SMALL = ("data.calibration.limit=8", "data.evaluate.test.limit=4", "verify.distance_samples=4")
CONVOLUTIONAL = ("cifar-resnet", "resnet", "efficientnet", "mobilenet-v2")
REFUSED = {
    ("gpt2", "w4a16-g128"): "blocks of 128 do not divide the 192 inputs",
    ("vit", "w4a16-g64"): "blocks of 64 do not divide the 96 inputs",
    ("vit", "w4a16-g128"): "blocks of 128 do not divide the 96 inputs",
    **{
        (family, f"w4a16-g{block}"): f"and not blocks of {block}"
        for family in CONVOLUTIONAL
        for block in (32, 64, 128)
    },
}
"""And what `check` says of them."""


@pytest.fixture(scope="module")
def tools() -> Iterator[tuple[ModuleType, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MATRIX)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield importlib.import_module("matrix"), importlib.import_module("layouts")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


def check(found: dict[str, Any], family: str, name: str) -> None:
    """What must hold of a cell."""
    if (family, name) in REFUSED:
        assert found["exit_code"] == 2 and REFUSED[family, name] in found["refused"]
        return
    assert "refused" not in found, found
    assert found["certificate"] and found["unexplained"] == 0
    assert not [finding for finding in found["lint"] if finding.startswith("error")]
    assert found["engine"] == "built" and found["plan_bytes"] > 0
    rounds = name not in ("w8a16", "w4a16-g32", "w4a16-g64", "w4a16-g128", "ipq")
    assert (found["codes"] > 0) is rounds
    assert found["held_within"]  # from the same codes, nothing is left but rounding of the compute type
    if not rounds:
        assert found["within"]  # nothing rounds, so nothing can flip


def test_the_cells_are_every_family_in_every_format(tools: tuple[ModuleType, ModuleType]) -> None:
    assert list(tools[0].cells()) == CELLS and len(CELLS) == 162
    assert {family for family, _, _ in CELLS} == set(KNOWN) - {*DISCOVERED.values()}


@needs_rtx
@pytest.mark.parametrize("cell", QUICK, ids="-".join)
def test_a_cell_holds(cell: tuple[str, str, str], tools: tuple[ModuleType, ModuleType], out: Path) -> None:
    check(tools[0].run_cell(*cell, ASSETS, out, *SMALL), *cell[:2])


@needs_rtx
@needs_assets
@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_every_cell_holds(
    cell: tuple[str, str, str], tools: tuple[ModuleType, ModuleType], out: Path
) -> None:
    check(tools[0].run_cell(*cell, ASSETS, out), *cell[:2])


def test_the_table_is_made_of_the_results_and_every_result_holds(
    tools: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    folder = tmp_path / "matrix"
    shutil.copytree(MATRIX, folder)
    tools[0].rebuild(folder)
    assert (folder / "README.md").read_bytes() == (MATRIX / "README.md").read_bytes()
    results = json.loads((MATRIX / "results.json").read_text())
    assert set(results) == {"-".join(cell) for cell in CELLS}
    for family, name, compute in CELLS:
        check(results[f"{family}-{name}-{compute}"], family, name)


@needs_assets
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_one_pretrained_bert_computes_the_same_in_other_layouts(
    family: str, tools: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    logging.disable_progress_bar()
    source = ASSETS / "models" / "all-MiniLM-L6-v2"
    laid = tools[1].lay_out(source, family, tmp_path / family)
    ids = torch.randint(1000, 20000, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 15:], mask[1, 15:] = 0, 0
    states = []
    for folder in (source, laid):
        model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        assert folder == source or model.config.model_type == family
        with torch.no_grad():
            states.append(model(input_ids=ids, attention_mask=mask).last_hidden_state)
    difference = (states[0] - states[1]).abs()[mask.bool()]
    assert float(states[0].abs().max()) > 1 and float(difference.max()) < 2e-5
