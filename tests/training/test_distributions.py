"""distributions.json against what numpy makes of the checkpoint and of the integers that are deployed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import OUTLIER, Line, make_recipe, start_line

from qcompress.training.distributions import _Channels


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, outlier_model: Path, text_file: Path) -> Line:
    """A Quadapter run on a model with an outlier channel in every norm. Read only."""
    recipe = make_recipe(text_file, steps=2, method="quadapter", format="w4a8")
    return (
        start_line(tmp_path_factory.mktemp("made") / "line", outlier_model, text_file, recipe).train().fold()
    )


def content(made: Line) -> dict[str, Any]:
    return json.loads((made.trained.path / "distributions.json").read_text())


def test_the_snr_is_that_of_the_integers_that_are_deployed(made: Line) -> None:
    floats = load_file(made.source / "model.safetensors")
    trained, folded = made.tensors(), made.tensors("fold")
    found = {entry["layer"]: entry for entry in content(made)["weights"]}
    assert found.keys() == {name.removesuffix(".weight.codes") for name in folded if name.endswith(".codes")}
    name = "transformer.h.1.mlp.c_fc"
    source = floats.get(f"{name}.weight", floats.get("h.1.mlp.c_fc.weight"))
    weight = source.double().numpy() / trained["transformer.h.1.ln_2.rescale"].double().numpy()[:, None]
    codes, scale = (folded[f"{name}.weight.{part}"].double().numpy() for part in ("codes", "scale"))
    noise = weight - codes * scale
    wanted = 10 * np.log10((weight**2).sum() / (noise**2).sum())
    assert found[name]["snr_db"] == pytest.approx(wanted, rel=1e-4)
    assert found[name]["values"] == weight.size and 10 < wanted < 40


def test_the_layers_with_the_lowest_snr_have_histograms_of_all_their_weights(made: Line) -> None:
    found = content(made)
    order = sorted(found["weights"], key=lambda entry: entry["snr_db"])
    assert [entry["layer"] for entry in found["histograms"]] == [entry["layer"] for entry in order[:4]]
    for entry, measured in zip(found["histograms"], order[:4], strict=True):
        assert sum(entry["float"]) == sum(entry["deployed"]) == measured["values"]
        assert len(entry["edges"]) == len(entry["float"]) + 1 == 49
    levels = [sum(count > 0 for count in entry["deployed"]) for entry in found["histograms"]]
    assert max(levels) <= 48 and levels != [
        sum(c > 0 for c in entry["float"]) for entry in found["histograms"]
    ]


def test_the_adapter_takes_the_outlier_away(made: Line) -> None:
    found, trained = content(made), made.tensors()
    assert [site["site"] for site in found["sites"]] == [
        f"transformer.h.{block}.{norm}" for block in (0, 1) for norm in ("ln_1", "ln_2")
    ]
    for site in found["channels"]:
        scale = trained[f"{site['site']}.rescale"]
        assert site["top"][0]["channel"] == OUTLIER
        for top in site["top"]:
            assert top["after"] == pytest.approx(top["before"] * float(scale[top["channel"]]), rel=1e-5)
        assert sum(site["before"]) == sum(site["after"]) == 64
    for site in found["sites"]:
        before, after = (site[when]["largest"] / site[when]["median"] for when in ("before", "after"))
        assert before > 3 * after > 1


def test_channels_are_counted_by_magnitude_and_silent_ones_apart() -> None:
    before = np.array([0.0, 1.0, 1.0, 1.0, 100.0])
    site = _Channels("norm", before, np.array([1.0, 2.0, 2.0, 2.0, 0.02]))
    assert site.summary() == {
        "site": "norm", "channels": 5, "silent": 1,
        "before": {"largest": 100.0, "median": 1.0}, "after": {"largest": 2.0, "median": 2.0},
    }  # fmt: skip
    found = site.histogram()
    assert found["before"][0] == 3 and found["before"][-1] == 1 and sum(found["before"]) == 4
    assert sum(found["after"]) == 4 and max(found["after"]) == 4
    assert found["top"][0] == {"channel": 4, "before": 100.0, "after": 2.0}
    quiet = _Channels("norm", np.zeros(3), np.ones(3))
    assert quiet.summary()["before"] == {"largest": None, "median": None} and quiet.histogram()["top"] == []


def test_codebooks_and_whole_tensors_are_measured_as_they_are_deployed(
    tmp_path: Path, tiny_model: Path, text_file: Path
) -> None:
    torch.manual_seed(0)
    book = {"codebook": "gather", "centroids": 16, "block": 8}
    form = {"weights": book, "embeddings": "int8",
            "layers": {"*.0.mlp.c_fc": {"weights": {"bits": 2, "ternary": True, "granularity": "tensor",
                                                    "container": "int8"}}}}  # fmt: skip
    recipe = make_recipe(text_file, format=form, method="ptq", quantizer={"weights": "ternary"})
    made = start_line(tmp_path / "line", tiny_model, text_file, recipe).train()
    found = {entry["layer"]: entry["snr_db"] for entry in content(made)["weights"]}
    source = load_file(tiny_model / "model.safetensors")
    for name in ("transformer.h.1.mlp.c_proj", "transformer.h.0.mlp.c_fc"):
        weight = source.get(f"{name}.weight", source.get(f"{name.removeprefix('transformer.')}.weight"))
        parts = {part: made.tensors().get(f"{name}.weight.{part}") for part in
                 ("assignments", "centroids", "scale", "threshold")}  # fmt: skip
        if parts["centroids"] is not None:
            picked = parts["centroids"][parts["assignments"].long()]  # [in / block, out, block]
            deployed = picked.transpose(1, 2).reshape(weight.shape)
        else:
            deployed = torch.where(weight.abs() > parts["threshold"], weight.sign() * parts["scale"], 0.0)
        noise = (weight - deployed).double().square().sum()
        wanted = 10 * torch.log10(weight.double().square().sum() / noise)
        assert found[name] == pytest.approx(float(wanted), rel=1e-4), name
    assert content(made)["sites"] == []
