import copy
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from good_recipe import FOREIGN, GOOD, edited, prepare, write
from safetensors.numpy import save_file

from qcompress.errors import ModelError, RecipeError
from qcompress.recipe.check import all_mistakes, check_model
from qcompress.recipe.load import load_recipe
from qcompress.recipe.yaml_file import dotted, dump_yaml, parse_yaml

WIDTH, BLOCKS, CONTEXT, VOCABULARY = 192, 2, 64, 32


def save_model(directory: Path, tied: bool = True) -> None:
    """A checkpoint of zeros in GPT-2's layout: 11 layers, 192 wide (which 64 divides, and 128 does not)."""
    shapes = {"transformer.wte": (VOCABULARY, WIDTH), "transformer.wpe": (CONTEXT, WIDTH)}
    for index in range(BLOCKS):
        for name, shape in {
            "attn.c_attn": (WIDTH, 3 * WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (WIDTH, 4 * WIDTH),
            "mlp.c_proj": (4 * WIDTH, WIDTH),
        }.items():
            shapes[f"transformer.h.{index}.{name}"] = shape
    shapes |= {} if tied else {"lm_head": (VOCABULARY, WIDTH)}
    tensors = {f"{name}.weight": np.zeros(shape, np.float16) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "vocab.json").write_text('{"a": 0}')
    (directory / "merges.txt").write_text("")
    config = {"model_type": "gpt2", "n_layer": BLOCKS, "n_embd": WIDTH, "n_positions": CONTEXT}
    config |= {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("recipes"))
    save_model(folder / "model")
    return folder


def shown(file: Path, *overrides: str) -> list[str]:
    reported = all_mistakes(file, overrides)[2]
    assert not [mistake for mistake in reported if FOREIGN.search(f"{mistake.message} {mistake.fix}")]
    return [str(mistake).replace(f"{file.parent}/", "") for mistake in reported]


def test_a_good_recipe_has_a_plan_and_its_patterns_have_layers(made: Path) -> None:
    resolved, report, mistakes = all_mistakes(write(made))
    assert mistakes == [] and resolved is not None and report is not None
    assert report.matches == {"transformer.h.0.*": 4, "transformer.h.1.mlp.c_fc": 1}
    assert len(report.plan) == len(report.architecture.layers) == 4 * BLOCKS + 3
    formats = {layer.name: (str(layer.weights), str(layer.activations)) for layer in report.plan}
    assert formats["transformer.h.0.mlp.c_fc"] == ("None", "None")
    assert formats["transformer.h.1.mlp.c_fc"] == ("int4 in int8", "int8")
    assert formats["lm_head"] == ("int8", "int8")
    assert check_model(load_recipe(write(made)), made / "model") == report


def test_the_five_mistakes_of_a_bad_recipe_are_exactly_five(made: Path) -> None:
    text = edited("train:\n", "trian:\n")
    text = edited("samples: 16", "samples: many", text)
    text = edited('"transformer.h.0.*"', '"*.lm_hed"', text)
    text = edited(
        "  weights: int8\n  activations: int8\n",
        "  weights: {bits: 4, block: 128}\n  activations: float\n",
        text,
    )
    text = edited("calibration: {text: [train.txt]}", "calibration: {text: [gone.txt]}", text)
    reported = shown(write(made, text, "five.yaml"))
    expected = [
        r"five\.yaml:7: data\.calibration\.text\[0\]: gone\.txt does not exist",
        r"five\.yaml:12: format\.weights\.block: blocks of 128 do not divide the 192 inputs .*`block: 64`",
        r'five\.yaml:17: format\.layers\."\*\.lm_hed": matches none of the 11 layers \(fix: .*lm_head',
        r"five\.yaml:20: trian: unknown key \(fix: did you mean `train`\?\)",
        r"five\.yaml:28: verify\.samples: must be a whole number, found text 'many'",
    ]
    assert len(reported) == 5, reported
    for pattern, line in zip(expected, reported, strict=True):
        assert re.match(pattern, line), line


LAYERS = '"transformer.h.0.*": float'
ONE_MISTAKE = {
    "a pattern without layers": (
        (LAYERS, "transformer.h.2.*: float"),
        r':17: format\.layers\."transformer\.h\.2\.\*": matches none',
    ),
    "a pattern without its prefix": (
        (LAYERS, '"h.0.*": float'),
        r":17: .*did you mean '\*\.h\.0\.\*' \(4 layers\)",
    ),
    "blocks that do not divide": (
        ("  weights: int8\n  activations: int8", "  weights: int4\n  activations: float"),
        r":12: format\.weights: blocks of 128 do not divide the 192 inputs of transformer\.h\.1\.attn\.c_attn"
        r", and 1 more \(fix: write \{bits: 4, block: 64\}\)",
    ),
    "blocks of a pattern": (
        (LAYERS, '"transformer.h.0.*": {weights: {bits: 4, block: 128}, activations: float}'),
        r':17: format\.layers\."transformer\.h\.0\.\*"\.weights\.block: blocks of 128 .*, and 2 more .*: 64`',
    ),
    "blocks of a preset": (
        (
            GOOD[GOOD.index("format:") : GOOD.index("method:")],
            "format: {preset: w4a16-g128, compute: fp16}\n",
        ),
        r":11: format\.preset: blocks of 128 .*, and 5 more \(fix: write \{bits: 4, block: 64\}",
    ),
    "a float head on an integer table": (
        (LAYERS, "lm_head: float"),
        r":17: format\.layers\.lm_head: gives .* lm_head float and transformer\.wte int8 are tied",
    ),
    "an integer head on a float table": (
        (LAYERS, "transformer.wte: float"),
        r':17: format\.layers\."transformer\.wte": gives .* lm_head int8 and transformer\.wte float are tied',
    ),
    "a context that is too long": (
        ("context: 64", "context: 65"),
        r":4: task\.context: is 65 tokens, and the model has 64",
    ),
    "activations that no target takes": (
        ("  activations: int8", "  activations: {granularity: channel}"),
        r":13: format\.activations\.granularity: TensorRT takes one scale for a whole activation",
    ),
    "activations of a pattern": (
        (LAYERS, '"transformer.h.0.*": {activations: {granularity: channel}}'),
        r':17: format\.layers\."transformer\.h\.0\.\*"\.activations\.granularity: .* and 3 other',
    ),
}


@pytest.mark.parametrize("what", ONE_MISTAKE)
def test_one_mistake_is_reported_once_where_it_is(what: str, made: Path) -> None:
    (old, new), expected = ONE_MISTAKE[what]
    file = write(made, edited(old, new))
    reported = shown(file)
    assert len(reported) == 1, reported
    assert re.match("recipe.yaml" + expected, reported[0]) and " (fix: " in reported[0], reported
    resolved, report, _ = all_mistakes(file)
    assert resolved is not None and report is None
    with pytest.raises(RecipeError, match="the recipe has 1 mistake:"):
        check_model(resolved, made / "model")


OVERRIDES = {
    ("build.target=rtx-turing", "format.weights={bits: 4, block: 64}", "format.activations=float"): (
        r"--set: format\.weights\.bits: target rtx-turing \(SM75\) has no int4"
    ),
    (
        "build.target=rtx-turing",
        "format.compute=bf16",
    ): r"--set: format\.compute: target rtx-turing has no bf16",
    (
        "format.weights={bits: 4, block: 64}",
    ): r"--set: format\.weights\.block: target rtx-ada cannot multiply int4",
    (
        "task.context=x",
        "build.profiles=[{sequence: [1, 8, 65]}]",
    ): r"--set: build\.profiles\[0\]\.sequence: goes to 65",
    ("task.context=128", "build.profiles=[{sequence: [1, 8, 65]}]"): r"--set: task\.context: is 128 tokens",
    ("format.weights={bits: 2, container: int2}", "export.opset=25", "format.activations=float"): (
        r"--set: format\.weights\.bits: target rtx-ada \(SM89\) has no int2.*set `container: int4`"
    ),
    ("build.target=cpu", "format.weights={bits: 2, container: int2}", "format.activations=float"): (
        r".*export\.opset: is 21, and .* is stored in int2, which requires opset 25 \(fix: write `opset: 25`"
    ),
    ("build.target=h100", "build.timing_cache=nowhere/h100.bin"): (
        r"--set: build\.timing_cache: 'nowhere/h100.bin' cannot be written"
    ),
    ("build.timing_cache=h100.bin",): r"--set: build\.timing_cache: TensorRT-RTX times nothing",
    ("format.compute=fp32", "export.keep_fp32=[norm]"): (
        r"--set: export\.keep_fp32: has no effect: `format.compute` is fp32"
    ),
    ("format.layers.lm_hed=float", "format.weights=int9"): r"--set: format\.layers\.lm_hed: matches none",
}


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_the_target_and_the_model_limit_what_overrides_may_ask(
    overrides: tuple[str, ...], made: Path
) -> None:
    reported = [
        line for line in shown(write(made), *overrides) if not re.search(r"found text '(x|int9)'", line)
    ]
    assert len(reported) == 1, reported
    assert re.match(OVERRIDES[overrides], reported[0]), reported


def test_the_last_pattern_that_gives_a_layer_its_format_is_the_one_to_mend(made: Path) -> None:
    block = "{weights: {bits: 4, block: 128}, activations: float}"
    layers = f"'*.mlp.*': {block}\n    '*.1.mlp.c_fc': {block}\n    '*.0.mlp.c_fc': int8"
    reported = shown(write(made, edited(GOOD[GOOD.index(LAYERS) : GOOD.index("\nmethod:")], layers)))
    assert [line.split(" (fix")[0].partition(" of ")[0] for line in reported] == [
        'recipe.yaml:18: format.layers."*.1.mlp.c_fc".weights.block: blocks'
    ]


def test_a_target_without_int4_and_a_block_that_does_not_divide_are_two_mistakes(made: Path) -> None:
    overrides = [
        "build.target=rtx-turing",
        "format.activations=float",
        "format.weights={bits: 4, block: 128}",
    ]
    assert [line.split(": ")[1] for line in shown(write(made), *overrides)] == [
        "format.weights.bits",
        "format.weights.block",
    ]


def test_ternary_codes_under_a_format_of_more_bits_are_a_mistake_of_the_format(made: Path) -> None:
    """sizes.json would count 8 bits for three values; one mistake for each key that says so."""
    narrow = "transformer.h.1.mlp.c_fc: {weights: {bits: 4, container: int8}}"
    reported = shown(write(made), "quantizer=ternary")
    assert [line.split(": ")[1] for line in reported] == [
        "format.weights",
        "format.embeddings",
        'format.layers."transformer.h.1.mlp.c_fc".weights.bits',
    ]
    what = "for transformer.h.1.attn.c_attn, and the quantizer `ternary` has the codes -1, 0, 1"
    assert f"is int8 {what} (fix: write `ternary`, or another quantizer such as" in reported[0]
    assert "`quantizer: {weights: lsq}`" in reported[0] and "`quantizer: {embeddings: lsq}`" in reported[1]
    ternary = edited("  weights: int8\n  activations: int8\n  embeddings: int8", "  preset: ternary-a8")
    assert len(shown(write(made, ternary), "quantizer=ternary")) == 1
    assert (
        shown(write(made, edited(narrow, "lm_head: {activations: float}", ternary)), "quantizer=ternary")
        == []
    )
    mixed = "quantizer={weights: ternary, activations: dynamic, embeddings: minmax}"
    assert len(shown(write(made, edited(narrow, "lm_head: {activations: float}")), mixed)) == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.blocks=[0, 2]"], r"model\.blocks: names block 2, and the checkpoint has 2 \(fix: "),
        (["model.blocks=[]"], r"model\.blocks: must be 1 or more"),
        (["model.blocks=all"], r"model\.blocks: .*every-other, pairs, or numbers"),
        (
            ["model.blocks=pairs", "format.layers={transformer.h.1.*: {weights: {bits: 4, container: int8}}}",
             "method=lsq", "train.phases=", "train.lr="],
            r"two formats: transformer\.h\.1\.attn\.c_attn int4 in int8 and transformer\.h\.0\.attn\.c_attn ",
        ),
        (["model.blocks=pairs", "format.layers="], r"method: nothing folds: blocks that share their weights"),
    ],
)  # fmt: skip
def test_what_picked_and_shared_blocks_do_not_allow(overrides: list[str], expected: str, made: Path) -> None:
    reported = shown(write(made), *overrides)
    assert len(reported) == 1 and re.search(expected, reported[0]), reported


def test_picked_blocks_are_the_models_layers(made: Path) -> None:
    _, report, mistakes = all_mistakes(write(made), ["model.blocks=[1]", "format.layers="])
    assert mistakes == [] and report is not None and report.architecture.blocks == ("transformer.h.0",)


def test_a_head_with_weights_of_its_own_may_be_float(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    save_model(folder / "model", tied=False)
    assert shown(write(folder, edited(LAYERS, "lm_head: float"))) == []


def test_a_layer_is_judged_unless_its_own_format_is_in_doubt(made: Path) -> None:
    """`transformer.h.0.*` has a typing mistake, so blocks are judged in block 1 alone."""
    text = edited("  weights: int8\n  activations: int8", "  weights: int4\n  activations: float")
    text = edited(
        LAYERS, f"{LAYERS.replace('float', '{wieghts: float}')}\n    lm_hed: {{weights: int9}}", text
    )
    expected = [
        "format.weights: blocks of 128 do not divide the 192 inputs of transformer.h.1.attn.c_attn, and 1",
        'format.layers."transformer.h.0.*".wieghts: unknown key',
        "format.layers.lm_hed: matches none of the 11 layers",
        "format.layers.lm_hed.weights: must be one of float, int8, int4, int3, int2, ternary, codebook, ",
    ]
    reported = shown(write(made, text))
    assert len(reported) == 4, reported
    assert all(
        line.split(": ", 1)[1].startswith(start) for line, start in zip(reported, expected, strict=True)
    )


def test_a_wrong_section_does_not_hide_what_others_say_about_the_model(made: Path) -> None:
    text = edited("context: 64", "context: 65", edited("gate:\n", "gat:\n"))
    text = edited("rtx-ada", "rtx-adaa", edited("lr: {adapter: 1.0e-3", "lr: {adapter: high", text))
    text = edited(
        LAYERS, "lm_hed: float\n    transformer.h.0.attn.c_proj: {weights: {bits: 4, block: 128}}", text
    )
    assert [line.split(": ")[1] for line in shown(write(made, text))] == [
        "task.context",
        "format.layers.lm_hed",
        'format.layers."transformer.h.0.attn.c_proj".weights.block',
        "train.lr.adapter",
        "build.target",
        "gat",
    ]


# Models -------------------------------------------------------------------------------------------


def test_a_hub_id_is_no_mistake_and_is_checked_where_it_was_downloaded_to(made: Path) -> None:
    file = write(made, edited("source: model", "source: org/name"))
    resolved, report, mistakes = all_mistakes(file)
    assert resolved is not None and report is None and mistakes == []
    _, report, mistakes = all_mistakes(file, directory=made / "model")
    assert report is not None and mistakes == []
    _, _, mistakes = all_mistakes(file, ["task.context=65"], made / "model")
    assert [mistake.key for mistake in mistakes] == ["task.context"]


def test_a_missing_model_is_one_mistake(made: Path) -> None:
    reported = shown(write(made, edited("source: model", "source: modle")))
    assert len(reported) == 1 and reported[0].startswith(
        "recipe.yaml:3: model.source: 'modle' does not exist"
    )


def test_a_model_that_cannot_be_read_is_one_mistake(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    file = write(folder)
    assert "model holds no config.json" in shown(file)[0]
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        check_model(load_recipe(file), folder / "model")
    save_model(folder / "model")
    (folder / "model" / "model.safetensors").write_bytes(b"short")
    reported = shown(file)
    assert len(reported) == 1
    assert re.match(
        r"recipe\.yaml:3: model\.source: .* is not a readable safetensors file .*\(fix: save", reported[0]
    )


# No recipe makes a traceback ----------------------------------------------------------------------

NASTY: tuple[Any, ...] = (
    None,
    "",
    "x",
    0,
    -1,
    1.5,
    True,
    float("nan"),
    10**30,
    [],
    [None],
    {},
    {"x": 1},
    {"name": []},
)


def keys(value: Any, key: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, item in items:
        yield (*key, part)
        yield from keys(item, (*key, part))


def changed(values: dict[str, Any], key: tuple[str | int, ...], *new: Any) -> dict[str, Any]:
    """A copy with the value at a key replaced, or removed if there is no new one."""
    values = copy.deepcopy(values)
    parent: Any = values
    for part in key[:-1]:
        parent = parent[part]
    if new:
        parent[key[-1]] = new[0]
    else:
        del parent[key[-1]]
    return values


def judged(file: Path, what: str) -> int:
    """Count of the mistakes; a recipe without any is whole."""
    resolved, report, mistakes = all_mistakes(file)
    assert mistakes or (resolved is not None and report is not None), what
    for mistake in mistakes:
        assert not FOREIGN.search(f"{mistake.message} {mistake.fix}"), (what, mistake)
        assert mistake.line > 0 and mistake.key, (what, mistake)
    return len(mistakes)


def test_a_key_that_is_missing_or_wrong_never_breaks_the_check(made: Path) -> None:
    values = parse_yaml(GOOD, "f").value
    counts: dict[str, int] = {}
    dice = random.Random(3)
    for key in keys(values):
        counts[f"{dotted(key)} gone"] = judged(write(made, dump_yaml(changed(values, key))), dotted(key))
        for nasty in dice.sample(NASTY, 3):
            what = f"{dotted(key)} = {nasty}"
            counts[what] = judged(write(made, dump_yaml(changed(values, key, nasty))), what)
    assert len(counts) == 81 * 4
    # One cause is one mistake; a mapping of something else is two, because it lacks what should be there.
    several = {what for what, count in counts.items() if count > 1}
    assert all(what.endswith((" = {'x': 1}", " = {'name': []}", "data = {}")) for what in several), several


def test_mutations_of_the_text_never_break_the_check(made: Path) -> None:
    pieces = [
        "[",
        "]",
        "{",
        "}",
        ":",
        ": ",
        "- ",
        "\n",
        "  ",
        "\t",
        '"',
        "'",
        "*",
        "&a ",
        "*a",
        "!",
        "#",
        "---\n",
        "é",
        "\0",
    ]
    dice = random.Random(7)
    refused = 0
    for number in range(200):
        text = GOOD
        for _ in range(dice.randint(1, 4)):
            start = dice.randrange(len(text))
            end = min(len(text), start + dice.choice([0, 1, 1, 5, 40]))
            text = text[:start] + dice.choice([*pieces, text[start:end] * 2, ""]) + text[end:]
        file = write(made, text)
        count = judged(file, f"mutation {number}")
        refused += count > 0
        if count:
            with pytest.raises(RecipeError, match="the recipe has "):
                check_model(load_recipe(file), made / "model")
    assert 100 < refused < 200


def test_a_check_takes_no_torch_and_no_onnx_and_less_than_a_second(made: Path) -> None:
    program = (
        "import sys, time; start = time.perf_counter(); from pathlib import Path;"
        " from qcompress.recipe.check import all_mistakes;"
        " assert all_mistakes(Path(sys.argv[1]))[2] == []; print(time.perf_counter() - start);"
        " print([name for name in ('torch', 'onnx', 'transformers', 'onnxruntime') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(write(made))], capture_output=True, text=True, check=True
    )
    seconds, imported = run.stdout.splitlines()
    assert imported == "[]"
    assert float(seconds) < 5  # 0.3 s on an idle machine; the limit allows for a busy one
