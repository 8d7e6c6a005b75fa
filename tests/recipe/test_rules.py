import re
from pathlib import Path

import pytest
from good_recipe import GOOD, TRAINED, edited, mistakes, prepare, write

ONE_MISTAKE = {
    "an illegal combination": (
        ("method: quadapter", "method: quadapter\nadapter: none"),
        r":20: adapter: `adapter: none`",
    ),
    "an illegal combination by schedule": (
        ("method: quadapter", "method: lsq\nadapter: quadapter"),
        r":20: adapter: .*\(fix: use `schedule: blockwise",
    ),
    "a float method with integers": (
        ("method: quadapter", "method: float"),
        r":19: method: `method: float` trains",
    ),
    "an integer method with floats": (
        (GOOD[GOOD.index("format:") : GOOD.index("method:")], "format: float\n"),
        r":11: format: `method: quadapter` quantizes",
    ),
    "a schedule without phases": (
        ("method: quadapter", "method: ptq"),
        r":23: train\.phases: .*trains nothing",
    ),
    "an unknown phase": (("    finetune:", "    fintune:"), r":25: train\.phases\.fintune: .*`finetune`"),
    "a rate of a role that rests": (
        ("{adapter: 1.0e-3,", "{weight: 1.0e-3,"),
        r":22: train\.lr\.weight: nothing of",
    ),
    "a rate that a phase does not use": (
        ("{scale: 1e-5}", "{other: 1e-5}"),
        r":25: train\.phases\.finetune\.lr\.other",
    ),
    "no data for the task's loss": (
        ("  train: {text: [train.txt], limit: 8}\n", ""),
        r":5: data\.train: is missing: .* 3 steps",
    ),
    "an unknown metric": (
        ("{test.perplexity: 40}", "{test.perplexty: 40}"),
        r":30: gate\.float_floor\.\"test.perplexty\".*`test\.perplexity`",
    ),
    "a metric of an unknown set": (
        ("{test.perplexity: {", "{tset.perplexity: {"),
        r":31: gate\.recovery\..*`test\.perplexity`",
    ),
    "a set that two goals miss": (
        ("    test: {text: [test.txt]}\n", ""),
        r":29: gate\.float_floor\..test\.perplexity.: is not a metric .*\(also gate\.recovery\..test\.",
    ),
    "an unknown target": (("rtx-ada", "rtx-adaa"), r":27: build\.target: is not a target.*`rtx-ada`"),
    "an engine for the cpu": (
        (
            "rtx-ada, profiles: [{batch: [1, 1, 2], sequence: [1, 8, 64]}]}\nverify: {require: [float,",
            "cpu}\nverify: {require: [engine,",
        ),
        r":28: verify\.require\[0\]: requires the row `engine`",
    ),
    "blocks left out where no weight trains": (
        ("  batch_size: 4\n", "  batch_size: 4\n  layer_drop: 0.1\n"),
        r":22: train\.layer_drop: .*`blockwise-then-end-to-end` trains none",
    ),
    "blocks left out that are compared": (
        (
            "method: quadapter\ntrain:\n  batch_size: 4\n  lr: {adapter: 1.0e-3, scale: 2e-4}\n  phases:\n"
            "    calibrate: {steps: 2}\n",
            "method: lsq\nobjective: distillation\ntrain:\n  layer_drop: 0.1\n  phases:\n",
        ),
        r":22: train\.layer_drop: .*`objective: distillation` compares each of them",
    ),
    "compiled without an update": (
        (TRAINED, "method: smoothquant\ntrain:\n  compile: true\n"),
        r":21: train\.compile: .*the schedule `calibrate` makes none",
    ),
    "compiled with blocks left out": (
        (TRAINED, "method: lsq\ntrain:\n  compile: true\n  layer_drop: 0.1\n"),
        r":21: train\.compile: .*`layer_drop` makes another graph at each update",
    ),
    **{
        f"compiled with a {axis} inside the graph: {name}": (
            (TRAINED, f"method: lsq\n{axis}: {name}\ntrain:\n  compile: true\n"),
            rf":22: train\.compile: .*`{axis}: {name}` reads .* inside it",
        )
        for axis, name in (("objective", "distillation"), ("stepper", "saq"), ("stepper", "squat"))
    },
    "a cache of fixed lengths": (
        ("{opset: 21, dynamic: [batch,", "{cache: true, dynamic: [batch,"),
        r":26: export\.dynamic: .*other lengths, and past is fixed",
    ),
    "a past that is too long": (
        ("{opset: 21, dynamic: [batch, sequence]}", "{opset: 21, cache: true}"),
        r":27: build\.profiles\[0\]\.past: goes to 255.*\[0, 63, 63\]",
    ),
    "an axis without its cache": (
        ("[batch, sequence]", "[batch, past]"),
        r":26: export\.dynamic\[1\]: .*\(fix: drop `past`",
    ),
    "a profile that is too long": (
        ("[1, 8, 64]", "[1, 8, 65]"),
        r":27: build\.profiles\[0\]\.sequence: goes to 65.*\[1, 8, 64\]",
    ),
    "a default profile that is too long": (
        (", sequence: [1, 8, 64]", ""),
        r":27: build\.profiles\[0\]\.sequence: goes to 256",
    ),
    "a model that is not there": (
        ("source: model", "source: modle"),
        r":3: model\.source: 'modle' does not exist",
    ),
    "a model that is a file": (
        ("source: model", "source: test.txt"),
        r":3: model\.source: 'test\.txt' is not a directory",
    ),
    "a run that is not there": (("source: model", "run: runs/x"), r":3: model\.run: 'runs/x' does not exist"),
    "a revision of a directory": (
        ("source: model", "source: model, revision: abc"),
        r":3: model\.revision: belongs to a hub id",
    ),
    "a missing file": (
        ("[other.txt]", "[othr.txt]"),
        r":10: data\.evaluate\.other\.text\[0\]: othr\.txt does not exist",
    ),
    "a file that two sets miss": (
        (
            "[train.txt], limit: 8}\n  calibration: {text: [train.txt]}",
            "[x], limit: 8}\n  calibration: {text: [./x]}",
        ),
        r":6: data\.train\.text\[0\]: x does not exist \(also data\.calibration\.text\[0\]\)",
    ),
    "a directory for a file": (("[other.txt]", "[model]"), r":10: .*: model is a directory"),
    "a dataset's directory that is not there": (
        ("{text: [other.txt]}", "{dataset: ./x}"),
        r":10: data\.evaluate\.other\.dataset: './x' does not exist",
    ),
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
    assert " (fix: " in reported[0]


def test_a_set_that_is_not_there_is_one_mistake_for_all_its_metrics(folder: Path) -> None:
    text = edited(
        "{test.perplexity: {",
        "{tset.token_accuracy: {",
        edited("{test.perplexity: 40", "{tset.perplexity: 40"),
    )
    (reported,) = mistakes(write(folder, text))
    assert "float_floor" in reported and '(also gate.recovery."tset.token_accuracy")' in reported


NO_DATA = ["method=ptq", "train=", "data.train=", "data.calibration="]
CALIBRATION = {
    "ranges of activations": ([], r":5: data\.calibration: is missing: the ranges of the activations"),
    "an adapter": (
        ["format={preset: w8a16, activations: float, layers: }", "adapter=quadapter"],
        r":5: data\.calibration: is missing: the adapter `quadapter` is fitted to it",
    ),
    "activations of one pattern": (
        ["format.activations=float", "format.layers={lm_head: {activations: int8}}"],
        r":5: data\.calibration: is missing: the ranges",
    ),
    "weights alone": (["format={activations: float, layers: }"], None),
    "training data": (["data.train={text: [train.txt]}"], None),
    "calibration data": (["data.calibration={text: [train.txt]}"], None),
    "nothing to quantize": (["method=float", "schedule=calibrate", "format=float"], None),
}


@pytest.mark.parametrize("what", CALIBRATION)
def test_calibration_data_is_needed_where_something_is_observed(what: str, folder: Path) -> None:
    overrides, expected = CALIBRATION[what]
    reported = mistakes(write(folder), *NO_DATA, *overrides)
    assert len(reported) == (expected is not None), reported
    assert expected is None or re.match("recipe.yaml" + expected, reported[0])


def test_no_training_data_is_needed_without_steps_on_it(folder: Path) -> None:
    file = write(folder)
    assert len(mistakes(file, "data.train=")) == 1
    assert mistakes(file, "data.train=", "train.phases.finetune.steps=0") == []
    assert len(mistakes(file, "data.train=", "train.phases=")) == 1  # the schedule has 300 steps of its own


PHASES = {
    "lsq": ("w8a8", ["finetune"]),
    "teacher-intervention": ("ternary-a8", ["intervention", "finetune"]),
    "ipq": ("ipq", ["finetune", "ffn", "embeddings", "attention", "rest"]),
}


@pytest.mark.parametrize("method", PHASES)
def test_training_data_is_needed_by_each_phase_that_makes_an_update(method: str, folder: Path) -> None:
    form, phases = PHASES[method]
    file = write(folder)
    for phase in phases:
        steps = ", ".join(f"{name}: {{steps: {5 * (name == phase)}}}" for name in phases)
        chosen = [f"method={method}", f"format={form}", "train=", f"train.phases={{{steps}}}"]
        assert mistakes(file, *chosen) == []
        (reported,) = mistakes(file, *chosen, "data.train=")
        assert re.match(
            rf"recipe\.yaml:5: data\.train: is missing: the phase {phase} trains 5 steps", reported
        )


def test_no_block_is_left_out_and_nothing_compiled_where_a_teacher_intervenes(folder: Path) -> None:
    taught = ["method=teacher-intervention", "format=ternary-a8", "train="]
    assert mistakes(write(folder), *taught) == []
    (reported,) = mistakes(write(folder), *taught, "train.compile=true")
    assert re.match(r"--set: train\.compile: .*`objective: teacher-intervention` reads activations", reported)
    (reported,) = mistakes(write(folder), *taught, "train.layer_drop=0.1")
    assert re.match(r"--set: train\.layer_drop: .*`objective: teacher-intervention` compares each", reported)


def test_a_float_format_is_one_that_leaves_every_weight_float(folder: Path) -> None:
    float_run = ["method=float", "train=", "format="]
    file = write(folder)
    assert mistakes(file, *float_run, "format=float") == []
    assert mistakes(file, *float_run, "format={layers: {lm_head: float}}") == []
    assert len(mistakes(file, *float_run, "format={layers: {lm_head: int8}}")) == 1
    assert len(mistakes(file, *float_run, "format={activations: int8}")) == 1
    assert mistakes(file, "format=", "format={layers: {lm_head: int8}}") == []
    assert mistakes(file, "format=", "format={embeddings: int8}") == []
    activations = "format={activations: int8, layers: {lm_head: {activations: int8}}}"
    assert len(mistakes(file, "format=", activations)) == 1
