"""Rules of codebooks and noise at `check`: message, place and fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from good_recipe import FOREIGN, prepare, write
from test_check import save_model

from qcompress.recipe.check import all_mistakes
from qcompress.schema.recipe import Recipe

RECIPE = {
    "name": "books",
    "model": {"family": "gpt2", "source": "model"},
    "task": {"name": "causal-lm", "context": 64},
    "data": {"train": {"text": ["train.txt"]}, "evaluate": {"test": {"text": ["test.txt"]}}},
    "format": "ipq",
    "method": "ipq",
    "build": {"target": "rtx-ada", "profiles": [{"batch": [1, 1, 2], "sequence": [1, 8, 64]}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = prepare(tmp_path_factory.mktemp("books"))
    save_model(made / "model")
    return made


def shown(folder: Path, **sections: object) -> list[str]:
    file = write(folder, yaml.safe_dump({**RECIPE, **sections}, sort_keys=False))
    reported = all_mistakes(file)[2]
    assert not [mistake for mistake in reported if FOREIGN.search(f"{mistake.message} {mistake.fix}")]
    return [str(mistake).replace(f"{folder}/", "") for mistake in reported]


BOOK = {"codebook": "gather"}
GOOD = {
    "ipq": {},
    "quant-noise int8": {"method": "quant-noise", "format": "w8a8"},
    "quant-noise at p 0.2": {"method": "quant-noise", "format": "w8a8", "quantizer": {"noise": 0.2}},
    "quant-noise with a codebook": {
        "method": "quant-noise",
        "quantizer": {"noise": {"form": "zero", "p": 0.1}},
    },
    "ptq of a codebook": {"method": "ptq"},
    "ipq without noise": {"quantizer": {"noise": "none"}},
    "ipq of some layers": {"format": {"preset": "w8a8", "layers": {"*.mlp.*": {"weights": BOOK}}}},
    "ipq taught by the float model": {"objective": {"name": "distillation", "attention": 0.0}},
    "ipq with saq": {"stepper": "saq"},
    "another order": {"schedule": {"order": ["attention", "ffn", "embeddings", "rest"]}},
    "a quarter of a byte": {"format": {"preset": "ipq", "weights": {**BOOK, "block": 4}}},
    "noise by blocks": {"method": "quant-noise", "format": "w8a8", "quantizer": {"noise": {"block": 16}}},
}


@pytest.mark.parametrize("name", GOOD)
def test_what_may_be_combined(folder: Path, name: str) -> None:
    assert shown(folder, **GOOD[name]) == []


BAD = {
    "vectors that do not divide": (
        {"format": {"preset": "ipq", "weights": {**BOOK, "block": 10}}},
        r"format\.weights.*: vectors of 10 do not divide the 192 inputs of transformer\.h\.0\.attn\.c_attn, "
        r"and 7 more \(fix: write `block: 2`\)",
    ),
    "no codebook to stage": (
        {"format": "w8a8"},
        r"method: makes codebooks of one set .* the format has no codebook \(fix: write `format: ipq`",
    ),
    "noise where nothing trains": (
        {"method": "ptq", "format": "w8a8", "quantizer": {"noise": 0.1}},
        r"quantizer: noise prepares weights that train, and the schedule `calibrate` trains none",
    ),
    "noise where only scales train": (
        {"method": "quadapter", "format": "w8a8", "quantizer": {"noise": 0.1}},
        r"quantizer: noise prepares weights that train, .* `blockwise-then-end-to-end` trains none",
    ),
    "blocks of noise that do not divide": (
        {"method": "quant-noise", "format": "w8a8", "quantizer": {"noise": {"block": 7}}},
        r"quantizer: blocks of 7 do not divide the 192 inputs of transformer\.wte",
    ),
    "all weights dropped": (
        {"quantizer": {"noise": {"form": "zero", "p": 1.0}}},
        r"quantizer\.noise: `form: zero` with p 1 leaves no weight",
    ),
    "more than everything": (
        {"quantizer": {"noise": {"p": 1.5}}},
        r"quantizer\.noise\.p: must be .*1",
    ),
    "an adapter": (
        {"method": "ptq", "adapter": "quadapter"},
        r"adapter: its scales divide weights .* transformer\.wte is a table of vectors \(fix: drop the",
    ),
    "a perturbed latent weight": (
        {"stepper": {"name": "saq", "case": 2}},
        r"stepper: moves weights before they are rounded, .*\(fix: set `case: 3`",
    ),
    "a latent perturbation of squat": (
        {"stepper": {"name": "squat", "perturb": "latent"}},
        r"stepper: moves weights before they are rounded, .*\(fix: set `perturb: quantized`",
    ),
    "bits of a codebook": (
        {"format": {"weights": {**BOOK, "bits": 4}}},
        r"format\.weights\.bits: unknown key",
    ),
    "too many centroids": (
        {"format": {"weights": {**BOOK, "centroids": 512}}},
        r"format\.weights\.centroids: must be .*256.*, found 512",
    ),
    "decoded without codes": (
        {"format": {"weights": {"codebook": "decode-int8"}}},
        r"format\.weights: the codes of the decoded weight are those of the table: write `table: int8`",
    ),
    "a set twice": (
        {"schedule": {"order": ["ffn", "ffn", "embeddings", "rest"]}},
        r"schedule: name each set once: ffn, embeddings, attention, rest",
    ),
    "noise that cuts vectors": (
        {"method": "quant-noise", "quantizer": {"noise": {"block": 12}}},
        r"quantizer: blocks of 12 cut the vectors of 8 channels of transformer\.wte in two",
    ),
    "a range that is looked at anyway": (
        {"method": "quant-noise", "format": "w8a8", "quantizer": {"name": "minmax", "renew": 10}},
        r"quantizer.*: `renew` is for `percentile` and `mse`",
    ),
    "nothing to train on": (
        {
            "data": {"evaluate": {"test": {"text": ["test.txt"]}}},
            "train": {"phases": {"finetune": {"steps": 0}}},
        },
        r"data\.train: is missing: the phase ffn trains 100 steps",
    ),
    "a tied head of another format": (
        {"format": {"preset": "ipq", "layers": {"lm_head": {"weights": "int8"}}}},
        r"gives one tensor two formats: lm_head int8 and transformer\.wte codebook 256x8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_may_not_is_one_mistake(folder: Path, name: str) -> None:
    sections, pattern = BAD[name]
    reported = shown(folder, **sections)
    assert len(reported) == 1, reported
    assert re.search(pattern, reported[0]), reported[0]


def test_every_target_takes_a_codebook_and_only_those_with_int8_a_decoded_one(folder: Path) -> None:
    for target in ("t4", "h100", "orin-jp6", "rtx-turing", "cpu"):
        build = {**RECIPE["build"], "target": target}
        compute = {"format": {"preset": "ipq", "compute": "fp16" if target != "cpu" else "fp32"}}
        assert shown(folder, build=build, **compute) == []


@pytest.mark.parametrize(
    ("method", "written", "noise"),
    [
        ("quant-noise", "lsq", {"p": 0.5, "form": "round"}),
        ("quant-noise", {"name": "minmax", "range": "mse", "renew": 100}, {"p": 0.5, "form": "round"}),
        ("quant-noise", {"weights": "lsq"}, {"p": 0.5, "form": "round"}),
        ("quant-noise", {"name": "lsq", "noise": "none"}, None),
        ("quant-noise", {"noise": {"block": 4}}, {"p": 0.5, "form": "round"}),
        ("ipq", {"noise": 0.2}, {"p": 0.2, "form": "zero"}),
        ("ipq", {"noise": {"p": 0.2}}, {"p": 0.2, "form": "zero"}),
        ("ipq", {"name": "codebook", "iterations": 3}, {"p": 0.1, "form": "zero"}),
        ("lsq", "lsq", None),
    ],
)
def test_what_is_written_without_a_word_about_noise_leaves_the_presets_alone(
    method: str, written: object, noise: dict[str, object] | None
) -> None:
    made = Recipe.model_validate({**RECIPE, "method": method, "quantizer": written}).quantizer
    assert (made.noise and made.noise.model_dump(include={"p", "form"})) == noise
    if written == "lsq":
        assert made.weights.name == made.activations.name == "lsq"


def test_a_recipe_without_codebooks_and_noise_is_written_as_before() -> None:
    made = Recipe.model_validate({**RECIPE, "method": "lsq", "format": "w8a8"})
    assert made.model_dump(mode="json")["quantizer"] == {
        "weights": {"name": "lsq", "init": "mse", "percentile": 99.99, "floor": 1e-3},
        "activations": {"name": "lsq", "init": "mse", "percentile": 99.99, "floor": 1e-3},
        "embeddings": {"name": "minmax", "range": "absmax", "percentile": 99.99},
    }
