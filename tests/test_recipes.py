"""The recipes that ship, and the table in the quickstart's header."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from qcompress.recipe.check import all_mistakes
from qcompress.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", ROOT / "recipes" / "quickstart" / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured() -> dict[str, dict[str, Any]]:
    file = ROOT / "recipes" / "quickstart" / "results.json"
    return json.loads(file.read_text(encoding="utf-8"))["results"]


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_valid_and_named_as_its_file(file: Path) -> None:
    changes = []
    model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
    start = model.get("run")
    if str(model.get("source")).startswith("../models/"):  # a checkpoint that its header says how to lay out
        (mistake,) = all_mistakes(file)[2]
        assert "model.source" in str(mistake)
        changes = ["model.source=somebody/resnet20"]
    if start is not None:  # the run of another recipe, which is not made here
        assert start.startswith("../runs/") and file.with_name(f"{start.split('/')[2]}.yaml") in RECIPES
        (mistake,) = all_mistakes(file)[2]
        assert "model.run" in str(mistake)
        changes = ["model={family: bert, source: sentence-transformers/all-MiniLM-L6-v2}"]
    assert load_recipe(file, changes).recipe.name == file.stem
    assert all_mistakes(file, changes)[2] == []


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_says_what_it_shows_costs_and_gives(file: Path) -> None:
    header = file.read_text(encoding="utf-8").split("\nname:")[0]
    for word in ("Shows:", "Cost:", "Result:"):
        assert f"# {word}" in header


def test_the_table_in_the_header_is_made_of_the_results() -> None:
    results = measured()
    assert sum(len(result["runs"]) for result in results.values()) == 16
    header = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    rows = study().table(results).split("\n")
    assert len(rows) == 2 + 1 + 8
    for row in rows:
        assert f"#   {row}\n" in header


def test_quadapter_wins_back_what_ptq_loses_and_loses_less_elsewhere_than_lsq() -> None:
    """The claim of the paper on the bundled model, from the measured results."""
    results = measured()

    def mean(arm: str, text: str, row: str = "onnx") -> float:
        runs = results[arm]["runs"]
        return sum(run[f"{row}.{text}.perplexity"] for run in runs) / len(runs)

    for form in ("w8a8", "w4a8"):
        base = mean(f"{form} ptq", "shakespeare", "float")
        lost = mean(f"{form} ptq", "shakespeare") - base
        assert (mean(f"{form} quadapter", "shakespeare") - base) / lost < 0.1
        assert mean(f"{form} quadapter", "wikitext2") < mean(f"{form} lsq", "wikitext2")


def test_the_bundled_model_without_its_outliers_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, since what was planted are powers of two; its norms have no outlying channel left."""
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    monkeypatch.syspath_prepend(ROOT / "recipes" / "quickstart")
    import planting

    planting.bundled_without_outliers(tmp_path / "plain")
    bundled = GPT2LMHeadModel.from_pretrained(ROOT / "recipes" / "quickstart" / "model").eval()
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "plain").eval()
    ids = torch.arange(64).reshape(2, 32) * 37 % bundled.config.vocab_size
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, bundled(ids).logits)
    planted = json.loads((ROOT / "recipes" / "quickstart" / "facts.json").read_text())["planted"][
        "activations"
    ]
    assert len(planted) == 9
    for item in planted:
        if item["activation"] != "value":
            norms = [
                getattr(model.transformer.h[item["block"]], item["activation"]) for model in (bundled, plain)
            ]
            quotient = (norms[0].weight / norms[1].weight)[item["channels"]]
            assert quotient.tolist() == item["factors"]
    again, _ = planting.plant(plain)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), bundled.parameters(), strict=True))
