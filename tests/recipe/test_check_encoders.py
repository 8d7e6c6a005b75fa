"""Checks of encoders, their heads and their points, before anything is trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from good_recipe import prepare, write
from test_check import save_model, shown
from tiny_bert import LABELS, SEQUENCE, make_encoder, save_encoder
from transformers import BertForSequenceClassification

from qcompress.errors import RecipeError
from qcompress.models import FAMILIES
from qcompress.models.checkpoint_files import read_config, read_tensors
from qcompress.models.config_checks import HeadError
from qcompress.pipeline.keys import Plan, parts
from qcompress.pipeline.stages.load import fingerprint
from qcompress.recipe.check import Report, check_model
from qcompress.recipe.load import load_recipe
from qcompress.schema.tasks import SequenceClassification
from qcompress.tasks import TASKS

RECIPE = """\
name: encoder
model: {family: bert, source: whole}
task: {name: causal-lm, context: 16}
data:
  train: {text: [train.txt]}
  evaluate: {test: {text: [test.txt]}}
format:
  preset: w8a8
method: ptq
"""


TASK = SequenceClassification(labels=list(LABELS), context=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    folder = prepare(tmp_path_factory.mktemp("recipes"))
    save_model(folder / "model")
    save_encoder(folder / "whole", text_file, "bert")
    save_encoder(folder / "bare", text_file, "bert", bare=True)
    return folder


def with_task(file: Path) -> Plan:
    """A recipe of the file with a task of labels, and its model."""
    resolved = load_recipe(file)
    resolved = replace(resolved, recipe=resolved.recipe.model_copy(update={"task": TASK}))
    source = resolved.base / resolved.recipe.model.source
    return Plan(resolved, source, fingerprint(source), check_model(resolved, source))


def said(file: Path) -> str:
    with pytest.raises(RecipeError) as refused:
        with_task(file)
    (mistake,) = refused.value.mistakes
    return str(mistake).replace(f"{file.parent}/", "")


def test_a_task_that_a_family_cannot_carry_is_named_with_those_it_can(made: Path) -> None:
    assert shown(write(made, RECIPE)) == [
        "recipe.yaml:3: task.name: a bert model cannot carry the task causal-lm "
        "(fix: write one of: sequence-classification, token-classification, feature-extraction, fill-mask, "
        "question-answering)"
    ]


def test_a_good_encoder_recipe_has_points_and_patterns_may_name_them(made: Path) -> None:
    text = RECIPE.replace(
        "  preset: w8a8\n",
        "  preset: w8a8\n  attention: int8\n  layers:\n    '*.query_point': {activations: float}\n"
        "    'bert.encoder.layer.0.*': float\n",
    )
    report = with_task(write(made, text)).report
    assert isinstance(report, Report) and len(report.points) == 16
    assert report.matches == {"*.query_point": 2, "bert.encoder.layer.0.*": 6}
    rounded = [item.name for item in report.points if item.activations]
    assert len(rounded) == 3 and all(".layer.1.attention.self." in name for name in rounded)


@pytest.mark.parametrize(
    ("method", "accepted"),
    [
        ("ptq", False),
        ("quadapter", False),
        ("lsq", True),
        ("float", True),
        ("lsq\ntrain: {phases: {finetune: {steps: 0}}}", False),
    ],
)
def test_a_new_head_needs_a_phase_that_trains_weights(made: Path, method: str, accepted: bool) -> None:
    text = RECIPE.replace("whole", "bare").replace("method: ptq", f"method: {method}")
    text = text.replace("w8a8", "float") if method == "float" else text
    file = write(made, text)
    if accepted:
        assert with_task(file).report.architecture.new_head
        return
    assert said(file) == (
        "recipe.yaml:2: model.source: lacks the head of the task sequence-classification (classifier.weight "
        "and 1 more), and no phase trains weights (fix: fine-tune first with `method: float`, and name that "
        "run under `model.run`)"
    )
    assert with_task(write(made, text.replace("bare", "whole"))).report.architecture.new_head == ()


def test_the_load_stage_depends_on_the_head_and_on_its_seed(made: Path) -> None:
    def key(source: str, seed: int) -> dict[str, object]:
        text = RECIPE.replace("whole", source).replace("method: ptq", f"method: lsq\nseed: {seed}")
        return parts(with_task(write(made, text)), "load", {})["values"]

    head = {"task": SEQUENCE, "labels": LABELS, "problem": "single_label_classification", "any_order": False}
    values = {"model": {"family": "bert", "blocks": None}, "head": head, "new_head": None, "processor": None}
    assert key("whole", 0) == key("whole", 1) == values
    assert key("bare", 0) != key("bare", 1)
    assert key("bare", 1)["new_head"] == {
        "seed": 1,
        "tensors": ["classifier.weight", "classifier.bias"],
    }


def test_labels_of_another_number_are_a_mistake_of_the_recipe(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.TASK", SequenceClassification(labels=["a", "b"], context=16))
    assert said(write(made, RECIPE)) == (
        "recipe.yaml:3: task.labels: the labels of checkpoint and recipe differ in number: the checkpoint "
        "has 3 (no, yes, maybe), the recipe 2 (a, b) (fix: name the checkpoint's labels in the recipe, or "
        "start from a checkpoint without a head)"
    )


SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"


@pytest.mark.parametrize(
    ("says", "kind", "message"),
    [
        (None, "single", ""),
        (None, "multi", ""),
        (SINGLE, "single", ""),
        (MULTI, "multi", ""),
        (
            MULTI,
            "single",
            "is single, and config.json of the checkpoint says problem_type "
            "multi_label_classification (fix: write `kind: multi` under `task`)",
        ),
        (
            SINGLE,
            "multi",
            "is multi, and config.json of the checkpoint says problem_type "
            "single_label_classification (fix: write `kind: single` under `task`)",
        ),
        (
            NUMBER,
            "single",
            "is single, and config.json of the checkpoint says problem_type regression (fix: "
            "write `kind: regression` under `task`)",
        ),
        (
            None,
            "regression",
            "a regression has one output, and the checkpoint's head has 3 (fix: write `kind: "
            "single` or `kind: multi` under `task`, or start from a checkpoint without a head)",
        ),
    ],
)
def test_the_kind_of_the_head_is_the_checkpoints(
    says: str | None, kind: str, message: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = made / "whole" / "config.json"
    before = file.read_text()
    monkeypatch.setattr(f"{__name__}.TASK", SequenceClassification(kind=kind, context=16))
    try:
        file.write_text(json.dumps(json.loads(before) | {"problem_type": says}))
        if message:
            assert said(write(made, RECIPE)) == f"recipe.yaml:3: task.kind: {message}"
        else:
            assert with_task(write(made, RECIPE)).report.architecture.new_head == ()
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]),
        (["contradiction", "entailment", "neutral"], ["contradiction", "entailment", "neutral"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["entailment", "neutral", "contradiction"]),
        (["a", "b", "c"], None),
    ],
)
def test_outputs_keep_the_checkpoints_names_and_order(
    names: list[str], expected: list[str] | None, made: Path
) -> None:
    """GLUE numbers the labels of MNLI in another order than most checkpoints' heads."""
    mnli = SequenceClassification(glue="mnli", context=16)
    head = TASKS[mnli.name].head(mnli)
    config = read_config(made / "whole") | {"id2label": {str(place): one for place, one in enumerate(names)}}
    tensors = read_tensors(made / "whole")
    if expected is None:
        with pytest.raises(HeadError, match=r"differ in name: the checkpoint has 3 \(a, b, c\)"):
            FAMILIES["bert"].task_config(config, tensors, head)
        return
    own = FAMILIES["bert"].task_config(config, tensors, head)
    assert list(own["id2label"].values()) == expected
    assert TASKS[mnli.name].settled(mnli, own).labels == expected


def test_one_output_is_a_number(made: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes a regression for one output; a softmax of it would be 1 whatever the text."""
    model = make_encoder("bert")
    config = model.config.__class__.from_dict(model.config.to_dict() | {"id2label": {0: "LABEL_0"}})
    shutil.copytree(made / "whole", made / "one")
    BertForSequenceClassification(config).save_pretrained(made / "one")
    text = write(made, RECIPE.replace("whole", "one"))
    monkeypatch.setattr(f"{__name__}.TASK", SequenceClassification(context=16))
    assert said(text) == (
        "recipe.yaml:3: task.kind: is single, and config.json of the checkpoint says 1 output, which gives a "
        "number (fix: write `kind: regression` under `task`)"
    )
    monkeypatch.setattr(f"{__name__}.TASK", SequenceClassification(kind="regression", context=16))
    assert with_task(text).report.architecture.layers[-1].out_features == 1


def test_points_that_a_family_lacks_and_formats_that_no_point_has_are_refused(made: Path) -> None:
    residual = RECIPE.replace("bert, source: whole", "gpt2, source: model").replace(
        "  preset: w8a8\n", "  preset: w8a8\n  residual: int8\n"
    )
    assert shown(write(made, residual)) == [
        "recipe.yaml:9: format.residual: a gpt2 model has no points of this kind (fix: drop the line, or "
        "write float)"
    ]
    narrow = RECIPE.replace("  preset: w8a8\n", "  preset: w8a8\n  attention: {granularity: channel}\n")
    assert said(write(made, narrow)) == (
        "recipe.yaml:9: format.attention: rounds bert.encoder.layer.0.attention.self.query_point to int8 "
        "per channel, and a point takes one scale and no zero point (fix: write int8, or float)"
    )
    pattern = RECIPE.replace(
        "  preset: w8a8\n", "  preset: w8a8\n  layers: {'*.key_point': {activations: {symmetric: false}}}\n"
    )
    assert said(write(made, pattern)).startswith(
        'recipe.yaml:9: format.layers."*.key_point": rounds bert.encoder.layer.0.attention.self.key_point to'
    )
    cache = RECIPE.replace("  preset: w8a8\n", "  preset: w8a8\n  cache: int8\n")
    assert said(write(made, cache)) == (
        "recipe.yaml:9: format.cache: a bert model continues no text and has no key-value cache (fix: drop "
        "the line)"
    )
    words = RECIPE.replace("  preset: w8a8\n", "  preset: w8a8\n  attention: int7\n")
    assert any("format.attention: must be one of" in line for line in shown(write(made, words)))


def test_a_float_method_with_rounded_points_is_a_contradiction(made: Path) -> None:
    text = RECIPE.replace("method: ptq", "method: float").replace("preset: w8a8", "attention: int8")
    reported = shown(write(made, text))
    assert any("trains the float model, and the format quantizes it" in line for line in reported)


@pytest.mark.parametrize(
    ("method", "key", "message"),
    [
        (
            "teacher-intervention",
            "method",
            "the teacher cannot intervene: gpt2 computes query, key and value",
        ),
        ("distillation", "method", "compares attention scores, and gpt2 computes query, key and value"),
    ],
)
def test_what_looks_into_attentions_wants_query_key_and_value_apart(
    made: Path, method: str, key: str, message: str
) -> None:
    form = "ternary-a8" if method == "teacher-intervention" else "w8a8"
    text = RECIPE.replace("bert, source: whole", "gpt2, source: model").replace(
        "method: ptq", f"method: {method}"
    )
    (reported,) = shown(write(made, text.replace("preset: w8a8", f"preset: {form}")))
    assert f": {key}: {message}" in reported


def test_distillation_without_attention_scores_is_for_every_family(made: Path) -> None:
    text = RECIPE.replace("bert, source: whole", "gpt2, source: model").replace(
        "method: ptq", "method: distillation\nobjective: {attention: 0}"
    )
    assert shown(write(made, text)) == []


def test_an_adapter_needs_a_place_to_fold_into(made: Path) -> None:
    """The norms of an encoder are none; its value projections are, which is what `auto` takes."""
    assert with_task(
        write(made, RECIPE.replace("method: ptq", "method: quadapter"))
    ).report.architecture.sites
    reported = said(write(made, RECIPE.replace("method: ptq", "method: quadapter\nadapter: {sites: norm}")))
    assert "adapter.sites: the norms of a bert model feed the residual" in reported
    assert "write `sites: value`" in reported


@pytest.mark.parametrize(
    ("method", "form", "found"),
    [
        ("awq", "preset: w8a8", "method: AWQ's scales are for weights whose input stays float, and bert"),
        (
            "smoothquant",
            "preset: w8a16",
            "method: it moves outliers of activations into weights, and rounds no",
        ),
        ("awq", "preset: w8a16", None),
        ("smoothquant", "preset: w8a8", None),
        ("awq", "preset: w8a8\n  layers: {'*.attention.output.dense': {activations: float}}", None),
    ],
)
def test_fixed_rescalings_are_held_against_the_format(
    made: Path, method: str, form: str, found: str | None
) -> None:
    text = RECIPE.replace("method: ptq", f"method: {method}").replace("preset: w8a8", form)
    file = write(made, text)
    if found is None:
        assert with_task(file).report.architecture.sites
    else:
        assert found in said(file)
