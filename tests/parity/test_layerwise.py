"""`verify --layers`: what differs between torch and ONNX, where first, and whether rounding is it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lines import Project, cli, finished
from onnx import numpy_helper

from qcompress import api
from qcompress.errors import ContractError, ExportError
from qcompress.parity.inputs import Artifacts
from qcompress.parity.layerwise import Held, Place
from qcompress.parity.measure import Measured
from qcompress.pipeline.stages.verify import wants_held
from qcompress.quant.folded import Rounding
from qcompress.report.layers import summary
from qcompress.system.artifacts import FoldedModel, read_json

LAYERS = [
    f"transformer.h.{block}.{name}"
    for block in (0, 1)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
] + ["lm_head"]


@pytest.fixture(scope="module")
def project(tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file)


@pytest.fixture
def copy(project: Project, tmp_path: Path) -> Project:
    return project.copy(tmp_path / "copy")


def edit(run: Path, name: str, change) -> None:
    """Replace one initializer of the run's graph."""
    model = onnx.load(str(run / "model.onnx"))
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, str(run / "model.onnx"))


def test_an_untouched_file_differs_at_ties_only(copy: Project) -> None:
    found = api.compare_layers(copy.latest)
    assert [layer["name"] for layer in found["layers"]] == LAYERS
    assert found["unexplained"] == 0 and found["first_unexplained"] is None
    for layer in found["layers"]:
        assert layer["folded_to_trained"]["max_abs"] == 0
        assert layer["codes"] == 6 * 32 * (256 if layer["name"].endswith("mlp.c_proj") else 64)
        assert layer["differ"] == layer["ties"]
    assert (copy.latest / "layers.json").is_file()
    assert not list(copy.latest.glob(".layers-*"))


def test_a_norm_that_no_certificate_covers_is_found_and_named(copy: Project) -> None:
    edit(copy.latest, "transformer.h.1.ln_2.weight", lambda values: values * np.float32(1.01))
    done = cli("verify", copy.latest, "--layers")
    found = done.stdout
    assert done.code == 3
    assert "first at the input of transformer.h.1.mlp.c_fc" in found.splitlines()[-1]
    # and nothing else is: what follows starts from the graph's own codes
    layers = {layer["name"]: layer for layer in api.compare_layers(copy.latest)["layers"]}
    assert [name for name, layer in layers.items() if layer["unexplained"]] == ["transformer.h.1.mlp.c_fc"]


def test_two_defects_are_both_named(copy: Project) -> None:
    for name in ("transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight"):
        edit(copy.latest, name, lambda values: values * np.float32(1.01))
    layers = api.compare_layers(copy.latest)["layers"]
    assert [layer["name"] for layer in layers if layer["unexplained"]] == [LAYERS[0], LAYERS[4]]


def test_a_changed_code_is_the_certificates_business(copy: Project) -> None:
    edit(copy.latest, "transformer.h.0.mlp.c_fc.weight.codes", lambda codes: np.bitwise_xor(codes, 1))
    with pytest.raises(ExportError, match="transformer.h.0.mlp.c_fc"):
        api.compare_layers(copy.latest)


def test_engine_and_layers_exclude_each_other(project: Project) -> None:
    done = cli("verify", project.latest, "--layers", "--engine", "x.json")
    assert done.code == 2 and "--layers" in done.stderr


# By hand ------------------------------------------------------------------------------------------


def test_a_tie_is_one_step_and_near_the_middle() -> None:
    place = Place("a", 1e-3)
    # 3.0001 / 2 = 1.50005 -> 2, found 1: a tie. 3.2 / 2 = 1.6 -> 2, found 1: none. 8 / 2 = 4, found 2: none
    x = torch.tensor([[3.0001, 3.2, 8.0, 4.0]])
    place.count(x, Rounding(torch.tensor(2.0)), torch.tensor([[1, 1, 2, 2]], dtype=torch.int16))
    assert (place.codes, place.differ, place.ties, place.unexplained) == (4, 3, 1, 2)
    assert place.farthest == pytest.approx(0.5)


def test_the_graphs_code_must_be_a_neighbour_of_the_tie() -> None:
    """Half precision takes a quarter of a step for a tie: but not in the other direction, and not clipped."""
    place = Place("a", 0.25)
    x = torch.tensor([[3.45, 3.45, 3.3, 140.5, 127.4]])
    found = torch.tensor([[4, 2, 4, 126, 126]], dtype=torch.int16)
    place.count(x, Rounding(torch.tensor(1.0)), found)
    # 3.45: 3, and 4 is the other side of 3.5; 2 is not. 3.3 is 0.2 from 3.5. 140.5 is far beyond 127
    assert (place.differ, place.ties) == (5, 2)


@pytest.mark.parametrize(("bounds", "ties"), [((-128, 127), 2), ((-8, 7), 1)])
def test_of_narrow_codes_less_is_a_tie(bounds: tuple[int, int], ties: int) -> None:
    """The noise of a compute type is a part of the value: at code 7 it is an 18th of what it is at 127."""
    place = Place("a", 0.25)
    place.count(
        torch.tensor([[3.49, 3.4]]), Rounding(torch.tensor(1.0), bounds), torch.tensor([[4, 4]]).short()
    )
    assert (place.differ, place.ties) == (2, ties)


def test_two_flips_are_chance_and_more_are_a_share() -> None:
    place = Place("a", 0.25, codes=100, differ=2)
    assert place.share == 0
    place.differ = 12
    assert place.share == 0.1 and Place("b", 0.25).share == 0


def test_a_held_rounding_goes_on_with_the_codes_of_the_graph() -> None:
    place = Place("a", 1e-3)
    held = Held(Rounding(torch.tensor(2.0)), place, {"a": np.array([[5, -3]], np.int16)})
    assert held(torch.tensor([[10.0, 4.0]])).tolist() == [[10.0, -6.0]]
    assert (place.codes, place.differ) == (2, 1)
    with pytest.raises(ContractError, match=r"a: \[1, 2\] codes for \[1, 3\] values"):
        held(torch.zeros(1, 3))


def test_the_words_say_what_differs_first() -> None:
    same = {"name": "a", "codes": 4, "differ": 0, "ties": 0, "folded_to_trained": None}
    other = {**same, "name": "b", "differ": 3, "ties": 2}
    quiet = {"layers": [same], "first_difference": None, "first_unexplained": None, "tie_limit": 1e-3}
    assert summary(quiet) == ["folded and onnx agree in every code of every layer"]
    found = {
        **quiet,
        "layers": [same, other],
        "first_difference": "b",
        "first_unexplained": "b",
        "unexplained": 1,
    }
    lines = summary(found)
    assert lines[0].endswith("input of b: 3 codes") and lines[-1].endswith("first at the input of b")
    assert "3 of 8 differ, 2 of them on a tie" in lines[1]


# In a run (`verify.held`) -------------------------------------------------------------------------


def onnx_row(run: Path) -> dict[str, Any]:
    (row,) = [row for row in read_json(run / "parity.json")["rows"] if row["stage"] == "onnx"]
    return row


def test_a_run_is_compared_from_the_graphs_own_codes(copy: Project) -> None:
    run = copy.run("gate.parity=", "verify.held=always")
    held = onnx_row(run.path)["held"]
    assert held["samples"] == 6 and held["codes"] == 6 * 32 * (8 * 64 + 2 * 192 + 64)
    assert held["differ"] < 1e-3 * held["codes"] and held["unexplained"] == 0
    assert held["first_unexplained"] is None and held["largest_share"] < 1e-3
    assert held["at"] in LAYERS
    assert held["distance"]["positions"] == 6 * 32 and held["distance"]["to"] == "folded"
    assert held["distance"]["max_abs"] <= 1e-5 * held["distance"]["range"]
    assert held["distance"]["top1_agreement"] == 1
    assert run.verdict == "accept"
    shown = cli("show", run.path).stdout
    assert "same codes" in shown
    assert f"{held['differ']} of {held['codes']:,} differ, 0 of them by more than a tie" in shown


def test_a_defect_in_the_graph_of_a_run_is_a_regression_and_named(copy: Project) -> None:
    """Within the recipe's wide limit of 0.05 of the range, which alone would have accepted it."""
    edit(copy.latest, "transformer.h.1.ln_2.weight", lambda values: values * np.float32(1.002))
    verdict = api.verify(copy.latest)
    held = onnx_row(copy.latest)["held"]
    assert held["unexplained"] > 0 and held["first_unexplained"] == "transformer.h.1.mlp.c_fc"
    assert verdict["verdict"] == "regression"
    assert verdict["reasons"][0].startswith(
        f"onnx.held: {held['unexplained']} of {held['codes']} codes differ"
    )


@pytest.mark.slow
def test_a_defect_behind_the_last_rounding_is_seen_in_the_logits(copy: Project) -> None:
    """The head of this run reads floats: no code follows the last norm."""
    run = copy.run(
        "gate.parity=", "name=open", "format.layers={lm_head: {activations: float}}", "verify.held=always"
    )
    assert run.verdict == "accept"
    edit(run.path, "transformer.ln_f.weight", lambda values: values * np.float32(1.01))
    verdict = api.verify(run.path)
    held = onnx_row(run.path)["held"]
    assert held["unexplained"] == 0 and verdict["verdict"] == "regression"
    assert verdict["reasons"][0].startswith("onnx.held: mean_abs to folded is 0.00")


@pytest.mark.parametrize(
    ("wanted", "far", "agreement", "compares"),
    [
        ("auto", 1e-4, 1.0, False), ("auto", 3e-4, 1.0, True), ("auto", 1e-4, 0.99, True),
        ("auto", math.nan, math.nan, True), ("auto", 1e-4, None, False), ("always", 0.0, 1.0, True),
        ("never", 1.0, 0.0, False),
    ],
)  # fmt: skip
def test_auto_compares_codes_where_the_row_misses_its_limits(
    project: Project, wanted: str, far: float, agreement: float | None, compares: bool
) -> None:
    loaded = api.load(project.latest)
    recipe = loaded.recipe.model_copy(
        update={"verify": loaded.recipe.verify.model_copy(update={"held": wanted})}
    )
    artifacts = Artifacts(None, None, FoldedModel(loaded.stage("fold")), None, None, {})
    distance = {"to": "folded", "mean_abs": 7 * far, "range": 7.0, "top1_agreement": agreement}
    measured = Measured({}, {}, distance)
    assert wants_held(recipe, artifacts, measured) is compares
    elsewhere = Measured({}, {}, {**distance, "to": "float"})  # nothing is known of flips then
    assert wants_held(recipe, artifacts, elsewhere) is (wanted == "always")
    assert not wants_held(recipe, Artifacts(None, None, None, None, None, {}), measured)
