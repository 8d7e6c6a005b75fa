import re
from pathlib import Path

import pytest
from good_recipe import GOOD, edited, mistakes, prepare, write

from qcompress.recipe.load import load_recipe

ONE_MISTAKE = {
    "an unknown key": (("train:\n", "trian:\n"), r":20: trian: unknown key \(fix: did you mean `train`\?\)"),
    "a misspelt section that is required": (("task:", "tsak:"), r":4: tsak: unknown key \(fix: .*`task`"),
    "an unknown key like no other": (("seed: 0", "zzz: 0"), r":2: zzz: unknown key \(fix: drop it, or write"),
    "a key in the wrong section": (
        ("seed: 0", "stride: 3"),
        r":2: stride: unknown key \(fix: it belongs under `task`",
    ),
    "a key that belongs at the top": (("{opset: 21,", "{method: lsq,"), r":26: export\.method: .*at the top"),
    "an unknown option of an axis": (
        ("method: quadapter", "method: quadapter\nadapter: {bond: 3}"),
        r":20: adapter\.bond: unknown key \(fix: did you mean `bound`\?\)",
    ),
    "an underscore for a dash": (
        ("percent-max-degradation", "percent_max_degradation"),
        r':31: gate\.recovery\."test\.perplexity"\.percent_max_.*: unknown key .*`percent-max-degradation`',
    ),
    "an unknown role": (
        ("{adapter: 1.0e-3", "{adaptr: 1.0e-3"),
        r":22: train\.lr\.adaptr: unknown key .*`adapter`",
    ),
    "an unknown row of the gate": (
        ("{onnx: {", "{onxx: {"),
        r":32: gate\.parity\.onxx: unknown key .*`onnx`",
    ),
    "a missing key": (("name: good\n", ""), r":1: name: is missing \(fix: write `name: "),
    "a missing section": (
        ("task: {name: causal-lm, context: 64, stride: 32}\n", ""),
        r":1: task: is missing",
    ),
    "a missing key of a section": (
        ("name: causal-lm, ", ""),
        r":4: task\.name: must be one of .*, found nothing",
    ),
    "a missing key in a mapping of names": (
        ("{steps: 2}", "{}"),
        r":24: train\.phases\.calibrate\.steps: is missing",
    ),
    "text for a number": (
        ("samples: 16", "samples: many"),
        r":28: verify\.samples: must be a whole number, found text",
    ),
    "a number with underscores": (
        ("samples: 16", "samples: 1_6"),
        r":28: verify\.samples: .*\(fix: write 16\)",
    ),
    "a float for a whole number": (("seed: 0", "seed: 3.0"), r":2: seed: .*found 3\.0 \(fix: write 3\)"),
    "a quoted number": (("batch_size: 4", 'batch_size: "4"'), r":21: train\.batch_size: .*\(fix: write 4\)"),
    "true for a number": (("seed: 0", "seed: true"), r":2: seed: must be a whole number, found true"),
    "off for false": (
        ("{opset: 21,", "{cache: off,"),
        r":26: export\.cache: must be true or false.*\(fix: write false\)",
    ),
    "yes for true": (
        ("{opset: 21,", "{cache: yes,"),
        r":26: export\.cache: .*found text 'yes' \(fix: write true\)",
    ),
    "a number for text": (("[test.txt]", "[5]"), r':9: data\.evaluate\.test\.text\[0\]: must be text.*"5"'),
    "a text for a list": (
        ("[test.txt]", "test.txt"),
        r":9: data\.evaluate\.test\.text: must be a list.*\[test\.txt\]",
    ),
    "a number for a section": (
        ("{opset: 21, dynamic: [batch, sequence]}", "5"),
        r":26: export: must be a mapping of keys",
    ),
    "an empty section": (("{opset: 21, dynamic: [batch, sequence]}", ""), r":26: export: is empty"),
    "an empty value": (("seed: 0", "seed:"), r":2: seed: is empty"),
    "an empty text": (("source: model", 'source: ""'), r":3: model\.source: is empty"),
    "an empty format": (("  weights: int8\n", "  weights:\n"), r":12: format\.weights: is empty"),
    "a number that is too small": (("batch_size: 4", "batch_size: 0"), r":21: .*must be at least 1, found 0"),
    "an infinite number": (("1.0e-3, scale", ".inf, scale"), r":22: train\.lr\.adapter: must be finite"),
    "no number": (
        ("test.perplexity: 40", "test.perplexity: .nan"),
        r":30: gate\.float_floor.*must be finite",
    ),
    "a learning rate of zero": (("1.0e-3, scale", "0, scale"), r":22: train\.lr\.adapter: must be above 0"),
    "a short list": (("[1, 1, 2]", "[1, 2]"), r":27: build\.profiles\[0\]\.batch: .*3 or more"),
    "an unordered profile": (
        ("[1, 1, 2]", "[2, 1, 1]"),
        r":27: build\.profiles\[0\]: batch must be 1 <= min",
    ),
    "an unknown word": (("compute: fp16", "compute: fp61"), r":15: format\.compute: must be one of .*`fp16`"),
    "an unknown item": (
        ("[batch, sequence]", "[bacth]"),
        r":26: export\.dynamic\[0\]: must be one of .*`batch`",
    ),
    "an unknown axis value": (
        ("method: quadapter", "method: quadapter\nadapter: quadaptr"),
        r":20: adapter: must be one of none, quadapter, .*, found text 'quadaptr' \(fix: .*`quadapter`",
    ),
    "an unknown axis value in a mapping": (
        ("method: quadapter", "method: quadapter\nadapter: {name: quadaptr}"),
        r":20: adapter\.name: must be one of",
    ),
    "an unknown quantizer for both roles": (
        ("method: quadapter", "method: quadapter\nquantizer: {name: lqs, init: mse}"),
        r":20: quantizer\.name: must be one of minmax, lsq",
    ),
    "a wrong option for both roles": (
        ("method: quadapter", "method: quadapter\nquantizer: {init: msw}"),
        r":20: quantizer\.init: must be one of mse, lsq, absmax, percentile",
    ),
    "an unknown method": (("quadapter", "quadaptr"), r":19: method: must be one of float, .*`quadapter`"),
    "a method that is not text": (("quadapter", "[lsq]"), r":19: method: must be one of float, "),
    "an unknown format": (
        ("  weights: int8\n", "  weights: int9\n"),
        r":12: format\.weights: must be one of .*`int8`",
    ),
    "an unknown preset": (
        ("format:\n", "format:\n  preset: w8a9\n"),
        r":12: format\.preset: must be one of .*`w8a8`",
    ),
    "an unknown format of a layer": (
        ('*": float', '*": flaot'),
        r':17: format\.layers\."transformer.*`float`',
    ),
    "impossible bits": (
        ("{bits: 4, ", "{bits: 5, "),
        r":18: format\.layers\..*\.weights\.bits: must be one of 8, 4, 3, 2, found 5",
    ),
    "bits in quotes": (
        ("{bits: 4, ", '{bits: "4", '),
        r":18: format\.layers\..*\.weights\.bits: must be .*found text '4' \(fix: write 4 without quotes",
    ),
    "a huge number for bits": (
        ("{bits: 4, ", f"{{bits: {10**30}, "),
        r":18: .*bits: must be one of 8, 4, 3, 2, found 1000",
    ),
    "a container that does not hold the codes": (
        ("bits: 4, container: int8", "bits: 8, container: int4"),
        r":18: format\.layers\..*\.weights: 8-bit codes do not fit",
    ),
    "two origins of the model": (
        ("source: model", "source: model, run: x"),
        r":3: model: give exactly one of",
    ),
    "two origins of a text": (
        ("[train.txt], limit", "[train.txt], dataset: x, limit"),
        r":6: data\.train: give exactly one",
    ),
    "two goals": (
        ("{percent-max", "{threshold: 3, percent-max"),
        r":31: gate\.recovery.*: give exactly one of",
    ),
    "a stride that skips tokens": (
        ("stride: 32", "stride: 65"),
        r":4: task: stride 65 is longer than context 64",
    ),
    "no evaluation set": (
        ("    test: {text: [test.txt]}\n    other: {text: [other.txt]}\n", "    {}\n"),
        r":8: data\.evaluate: .*1 or more",
    ),
    "a name that leaves its folder": (
        ("name: good", "name: ../good"),
        r":1: name: must be a slug.*\(fix: write good\)",
    ),
    "a set whose name leaves its folder": (
        ("    other: ", "    ../other: "),
        r":10: data\.evaluate\.\"\.\./other\": .*slug",
    ),
    "a set with an empty name": (("    other: ", '    "": '), r':10: data\.evaluate\."": .*slug'),
    "a key that is written twice": (
        ("seed: 0", "seed: 0\nname: x"),
        r":3: name: is written twice, first in line 1",
    ),
    "a section that is written twice": (
        ("gate:\n", "data: {}\ngate:\n"),
        r":29: data: is written twice, first in line 5",
    ),
    "a tag": (("seed: 0", "seed: !x 0"), r":2: seed: has the tag !x"),
    "a syntax error": (("seed: 0", "seed: [0"), r":3: file: column 6: "),
}

SAYS_IT_ITSELF = {
    "an unordered profile",
    "a container that does not hold the codes",
    "two origins of the model",
    "two origins of a text",
    "two goals",
    "a stride that skips tokens",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


@pytest.mark.parametrize("what", ONE_MISTAKE)
def test_one_mistake_is_reported_once_where_it_is(what: str, folder: Path) -> None:
    (old, new), expected = ONE_MISTAKE[what]
    reported = mistakes(write(folder, edited(old, new)))
    assert len(reported) == 1, reported
    assert re.match("recipe.yaml" + expected, reported[0]), reported
    assert " (fix: " in reported[0] or what in SAYS_IT_ITSELF


def test_a_wrong_value_does_not_hide_what_is_wrong_with_its_name(folder: Path) -> None:
    text = edited("{test.perplexity: {percent-max", "{tset.perplexity: {percent_max")
    text = edited("finetune: {steps: 3,", "fintune: {steps: few,", text)
    text = edited("{text: [other.txt]}", "{text: other.txt}", edited("    other: ", "    Other: ", text))
    assert [line.split(": ")[1] for line in mistakes(write(folder, text))] == [
        "data.evaluate.Other",
        "data.evaluate.Other.text",
        "train.phases.fintune",
        "train.phases.fintune.steps",
        'gate.recovery."tset.perplexity"',
        'gate.recovery."tset.perplexity".percent_max-degradation',
    ]


def test_a_wrong_method_or_preset_does_not_blame_the_keys_that_it_would_have_set(folder: Path) -> None:
    text = edited(
        GOOD[GOOD.index("format:") : GOOD.index("method:")], "format: {preset: w8a9, compute: fp61}\n"
    )
    text = edited("method: quadapter", "method: quadaptr\nadapter: {bound: 3.0}", text)
    assert [line.split(": ")[1] for line in mistakes(write(folder, text))] == [
        "format.compute",
        "format.preset",
        "method",
    ]


def test_options_without_a_name_change_what_the_preset_chose(folder: Path) -> None:
    text = edited(GOOD[GOOD.index("format:") : GOOD.index("method:")], "format: w4a16-g128\n")
    overrides = ["format.weights.block=64", "adapter.bound=3", "quantizer.weights=minmax"]
    recipe = load_recipe(write(folder, text), overrides).recipe
    assert (recipe.format.weights.bits, recipe.format.weights.block) == (4, 64)
    assert (recipe.adapter.name, recipe.adapter.bound) == ("quadapter", 3.0)
    assert (recipe.quantizer.weights.name, recipe.quantizer.activations.init) == ("minmax", "mse")
