import os
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from good_recipe import GOOD, edited, mistakes, prepare, write

from qcompress.errors import RecipeError
from qcompress.recipe.load import dump_recipe, examine, load_recipe
from qcompress.recipe.validate import validate
from qcompress.recipe.yaml_file import dump_yaml, parse_yaml
from qcompress.schema.axes import METHODS, PHASES
from qcompress.schema.formats import FORMAT_PRESETS
from qcompress.schema.recipe import Export, Recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def test_the_good_recipe_has_no_mistake_and_knows_its_lines(folder: Path) -> None:
    resolved = load_recipe(write(folder))
    assert resolved.recipe.adapter.name == "quadapter" and resolved.recipe.train.lr["scale"] == 2e-4
    assert resolved.base == folder and resolved.file == folder / "recipe.yaml"
    lines = resolved.lines
    for key, text in {
        "name": "name:",
        "data.evaluate.other.text[0]": "other:",
        'format.layers."transformer.h.0.*"': '"transformer.h.0.*"',
        "train.phases.finetune.lr.scale": "finetune:",
        'gate.float_floor."test.perplexity"': "float_floor:",
    }.items():
        assert GOOD.splitlines()[lines[key] - 1].strip().startswith(text)
    assert len(lines) == count(yaml.safe_load(GOOD)) == 81


def count(value: object) -> int:
    """Keys and items in a value, at any depth."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(1 + count(item) for item in items)


def test_five_mistakes_of_different_kinds_are_five(folder: Path) -> None:
    text = edited("train:\n", "trian:\n")
    text = edited("samples: 16", "samples: many", text)
    text = edited("[other.txt]", "[nowhere.txt]", text)
    text = edited("rtx-ada", "rtx-adaa", text)
    text = edited("test.perplexity: 40", "test.perplexty: 40", text)
    assert [line.split(": ")[1] for line in mistakes(write(folder, text))] == [
        "data.evaluate.other.text[0]",
        "trian",
        "build.target",
        "verify.samples",
        'gate.float_floor."test.perplexty"',
    ]


def test_paths_are_relative_to_the_recipe_whatever_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert load_recipe(Path("../recipe.yaml")).base == folder
    write(folder, edited("name: good", "name: .."))
    with pytest.raises(RecipeError, match=r"\n  \.\./recipe\.yaml:1: name: must be a slug"):
        load_recipe(Path("../recipe.yaml"))


def test_absolute_paths_parents_and_links_may_be_named_for_inputs(folder: Path) -> None:
    (folder / "sub").mkdir()
    os.symlink(folder / "model", folder / "sub" / "link")
    text = edited("source: model", "source: link")
    text = edited("[other.txt]", f"[../other.txt, {folder}/other.txt]", text)
    text = text.replace("train.txt", "../train.txt").replace("[test.txt]", "[../test.txt]")
    assert mistakes(write(folder, text, "sub/recipe.yaml")) == []


# Dumping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", FORMAT_PRESETS)
def test_a_dumped_recipe_loads_as_an_equal_one(method: str, preset: str) -> None:
    values = parse_yaml(GOOD, "f").value
    for form in (preset, {"preset": preset, "compute": "bf16", "layers": {"*": preset, "lm_head": "float"}}):
        recipe = Recipe.model_validate({**values, "method": method, "format": form})
        document = parse_yaml(dump_recipe(recipe), "f")
        assert validate(document) == recipe
        assert document.mistakes == []


def test_a_dumped_recipe_has_no_mistake_of_its_own(folder: Path) -> None:
    recipe = load_recipe(write(folder)).recipe
    assert load_recipe(write(folder, dump_recipe(recipe), "resolved.yaml")).recipe == recipe


@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("sequence-classification", "{table: [a.csv]}"),
        ("token-classification", "{table: [a.jsonl], columns: {tags: ner}}"),
        ("image-classification", "{folder: images}"),
    ],
)
def test_a_dumped_classification_loads_as_an_equal_one(task: str, data: str, folder: Path) -> None:
    """It spells out `column: text`, the default of a key that belongs to causal-lm."""
    family = "vit" if task.startswith("image") else "bert"
    for name in ("a.csv", "a.jsonl", "images"):
        (folder / name).mkdir() if name == "images" else (folder / name).write_text("")
    text = f"""
        name: a
        model: {{family: {family}, source: model}}
        task: {{name: {task}}}
        data: {{train: {data}, calibration: {data}, evaluate: {{test: {data}}}}}
        format: w8a8
        method: lsq
        """
    recipe = load_recipe(write(folder, dedent(text))).recipe
    again = dump_recipe(recipe)
    assert "column: text" in again
    assert load_recipe(write(folder, again, "resolved.yaml")).recipe == recipe
    (mistake,) = mistakes(write(folder, again.replace("column: text", "column: body", 1), "wrong.yaml"))
    assert "belongs to causal-lm" in mistake


# extends ------------------------------------------------------------------------------------------


def test_a_child_adds_replaces_and_removes(folder: Path) -> None:
    write(folder)
    child = "extends: recipe.yaml\nname: child\ntrain: {batch_size: 2, phases: }\n"
    child += "data: {evaluate: {new: {text: [test.txt]}}}\n"
    recipe = load_recipe(write(folder, child, "child.yaml")).recipe
    assert (recipe.name, recipe.train.batch_size) == ("child", 2)
    steps = {name: phase.steps for name, phase in recipe.train.phases.items()}
    assert steps == {name: phase.steps for name, phase in PHASES["blockwise-then-end-to-end"].items()}
    assert recipe.train.lr["adapter"] == 1e-3
    assert list(recipe.data.evaluate) == ["test", "other", "new"]


LAID_OVER = {
    "an axis by name": ("adapter: {name: quadapter, bound: 50.0}", "adapter: none", "adapter", "none"),
    "an axis by a mapping": (
        "adapter: {name: quadapter, bound: 50.0}",
        "adapter: {name: none}",
        "adapter",
        {"name": "none"},
    ),
    "an option of an axis": (
        "adapter: quadapter",
        "adapter: {bound: 50.0}",
        "adapter",
        {"name": "quadapter", "bound": 50.0},
    ),
    "one quantizer of two": (
        "quantizer: lsq",
        "quantizer: {weights: minmax}",
        "quantizer",
        {"weights": "minmax", "activations": "lsq"},
    ),
    "an option of a quantizer": (
        "quantizer: {weights: lsq}",
        "quantizer: {weights: {init: mse}}",
        "quantizer",
        {"weights": {"name": "lsq", "init": "mse"}},
    ),
    "a key beside a preset": (
        "format: w8a8",
        "format: {compute: fp16}",
        "format",
        {"preset": "w8a8", "compute": "fp16"},
    ),
    "a preset over a mapping": ("format: {weights: int8}", "format: w8a8", "format", "w8a8"),
    "a block of a word": (
        "format: {weights: int4}",
        "format: {weights: {block: 64}}",
        "format",
        {
            "weights": {
                "bits": 4,
                "ternary": False,
                "granularity": "channel",
                "block": 64,
                "container": None,
            }
        },
    ),
    "other bits": (
        "format: {weights: {bits: 4, block: 64}}",
        "format: {weights: {bits: 8}}",
        "format",
        {"weights": {"bits": 8}},
    ),
    "another source": (
        "model: {family: gpt2, source: a/b, revision: x, blocks: [0]}",
        "model: {source: c/d}",
        "model",
        {"family": "gpt2", "source": "c/d"},
    ),
    "the same source": (
        "model: {source: a/b, revision: x}",
        "model: {source: a/b}",
        "model",
        {"source": "a/b", "revision": "x"},
    ),
    "a run for a source": ("model: {source: a/b, revision: x}", "model: {run: r}", "model", {"run": "r"}),
    "a dataset for a text": (
        "data: {train: {text: [a], limit: 3}}",
        "data: {train: {dataset: a/b}}",
        "data",
        {"train": {"limit": 3, "dataset": "a/b"}},
    ),
    "another kind of goal": (
        "gate: {recovery: {t.m: {threshold: 3}}}",
        "gate: {recovery: {t.m: {max-degradation: 1}}}",
        "gate",
        {"recovery": {"t.m": {"max-degradation": 1}}},
    ),
    "sets named like options": (
        "data: {evaluate: {text: {text: [a]}}}",
        "data: {evaluate: {dataset: {text: [a]}}}",
        "data",
        {"evaluate": {"text": {"text": ["a"]}, "dataset": {"text": ["a"]}}},
    ),
    "a list": (
        "export: {dynamic: [batch, sequence]}",
        "export: {dynamic: [batch]}",
        "export",
        {"dynamic": ["batch"]},
    ),
    "nothing": ("train: {batch_size: 3}", "train: {}", "train", {"batch_size": 3}),
    "a scalar by a mapping": ("seed: 3", "seed: {a: 1}", "seed", {"a": 1}),
}


@pytest.mark.parametrize("what", LAID_OVER)
def test_what_lies_over_replaces_what_it_chooses_anew_and_nothing_else(what: str, tmp_path: Path) -> None:
    below, above, key, expected = LAID_OVER[what]
    write(tmp_path, below, "below.yaml")
    document, _ = examine(write(tmp_path, f"extends: below.yaml\n{above}\n"))
    assert document.value == {key: expected}
    (name, value), *_ = parse_yaml(above, "f").value.items()
    flow = dump_yaml({"v": value}).removeprefix("v:") if not isinstance(value, (dict, list)) else repr(value)
    document, _ = examine(write(tmp_path, below), [f"{name}={flow.replace('None', 'null')}"])
    assert document.value == {key: expected}


def test_a_pattern_that_is_written_again_is_the_last_to_match(folder: Path) -> None:
    write(folder)
    child = "extends: recipe.yaml\nformat: {layers: {'transformer.h.0.*': int8}}\n"
    layers = load_recipe(write(folder, child, "child.yaml")).recipe.format.layers
    assert list(layers) == ["transformer.h.1.mlp.c_fc", "transformer.h.0.*"]
    assert layers["transformer.h.0.*"].weights.bits == 8


def test_a_mistake_names_the_file_and_line_that_it_is_in(folder: Path) -> None:
    text = edited("batch_size: 4", "batch_size: 0", edited("seed: 0", "seed: x"))
    write(folder, text, "base.yaml")
    child = write(folder, "extends: ../base.yaml\nseed: 1\n\nverify: {samples: y}\n", "sub/child.yaml")
    first, second = mistakes(child)
    assert first.startswith("../base.yaml:21: train.batch_size: must be at least 1")
    assert second.startswith("child.yaml:4: verify.samples: must be a whole number")


def test_paths_of_an_extended_file_are_relative_to_that_file(folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "set").mkdir()
    (folder / "there").mkdir()
    text = edited("{text: [other.txt]}", "{dataset: set}")
    write(folder, text, "base.yaml")
    write(folder, "extends: ../base.yaml\nseed: 3\n", "a/middle.yaml")
    child = write(folder, "extends: ../middle.yaml\ndata: {train: {text: [own.txt]}}\n", "a/b/child.yaml")
    (folder / "a" / "b" / "own.txt").write_text("text\n")
    os.symlink(child.parent, folder / "there" / "link")
    for file in (child, folder / "there" / "link" / "child.yaml"):
        resolved = load_recipe(file)
        recipe = resolved.recipe
        assert recipe.seed == 3 and recipe.data.train.text == ["own.txt"]
        named = [recipe.model.source, *recipe.data.calibration.text, recipe.data.evaluate["other"].dataset]
        for name, path in zip(named, ("model", "train.txt", "set"), strict=True):
            assert not os.path.isabs(name)
            assert (resolved.base / name).resolve() == folder / path


def test_a_run_and_a_timing_cache_of_an_extended_file_are_relative_to_that_file(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "runs" / "first").mkdir(parents=True)
    text = edited(
        "source: model", "run: runs/first", edited("{target: rtx-ada,", "{target: l4, timing_cache: t,")
    )
    write(folder, text, "base.yaml")
    resolved = load_recipe(write(folder, "extends: ../base.yaml\n", "a/child.yaml"))
    assert resolved.base == folder / "a"
    assert (resolved.recipe.model.run, resolved.recipe.build.timing_cache) == ("../runs/first", "../t")


def test_paths_hold_where_a_link_stands_between_two_files(folder: Path) -> None:
    (folder / "a" / "b" / "c").mkdir(parents=True)
    os.symlink(folder / "a" / "b" / "c", folder / "link")
    write(folder, GOOD, "base.yaml")
    resolved = load_recipe(write(folder, f"extends: {folder}/base.yaml\n", "link/child.yaml"))
    assert (resolved.base / resolved.recipe.model.source).resolve() == folder / "model"
    assert mistakes(write(folder, "extends: ../../../base.yaml\n", "link/child.yaml")) == []


def test_what_no_file_has_is_missing_from_the_recipe_itself(folder: Path) -> None:
    write(folder, edited("name: good\n", ""), "base.yaml")
    (reported,) = mistakes(write(folder, "\nextends: base.yaml\n", "child.yaml"))
    assert reported.startswith("child.yaml:1: name: is missing")


def test_a_dataset_of_an_extended_file_stays_a_directory(folder: Path) -> None:
    (folder / "sub" / "set").mkdir(parents=True)
    text = (
        edited("{text: [other.txt]}", "{dataset: set}")
        .replace(": model}", ": ../model}")
        .replace("[t", "[../t")
    )
    write(folder, text, "sub/base.yaml")
    recipe = load_recipe(write(folder, "extends: sub/base.yaml\n", "child.yaml")).recipe
    assert recipe.data.evaluate["other"].dataset == "./sub/set"  # `sub/set` would be a name on the hub
    write(folder, edited("{dataset: set}", "{dataset: ./sett}", text), "sub/base.yaml")
    (reported,) = mistakes(folder / "child.yaml")
    assert reported.startswith("sub/base.yaml:10: data.evaluate.other.dataset: './sub/./sett' does not exist")


def test_hub_names_of_an_extended_file_stay_as_they_are(folder: Path) -> None:
    text = edited("source: model", "source: openai-community/gpt2, revision: abc")
    write(folder, edited("{text: [other.txt]}", "{dataset: org/set}", text), "base.yaml")
    (folder / "sub").mkdir()
    recipe = load_recipe(write(folder, "extends: ../base.yaml\n", "sub/child.yaml")).recipe
    assert recipe.model.source == "openai-community/gpt2" and recipe.model.revision == "abc"
    assert recipe.data.evaluate["other"].dataset == "org/set"


@pytest.mark.parametrize(
    ("extends", "match"),
    [
        ("child.yaml", r"child\.yaml:2: extends: child\.yaml extends itself"),
        ("other.yaml", r"other\.yaml:1: extends: child\.yaml extends itself"),
        ("nowhere.yaml", r"child\.yaml:2: extends: nowhere\.yaml does not exist"),
        ("model", r"child\.yaml:2: extends: model is not a file"),
        ("[a, b]", r"child\.yaml:2: extends: must be the name of a file"),
        ('""', r"child\.yaml:2: extends: must be the name of a file"),
        ("", r"child\.yaml:2: extends: must be the name of a file"),
        ("broken.yaml", r"broken\.yaml:2: file: column 3: "),
        ("latin.yaml", r"latin\.yaml:1: file: is not UTF-8"),
    ],
)
def test_an_extends_that_leads_nowhere_is_one_mistake(extends: str, match: str, folder: Path) -> None:
    write(folder, "extends: child.yaml\n", "other.yaml")
    write(folder, "a: 1\n b: 2\n", "broken.yaml")
    (folder / "latin.yaml").write_bytes(b"a: \xe9\n")
    own = "data: {train: {text: [no]}}\ngate: {float_floor: {test.perplexity: 40}}\n"
    child = write(folder, f"name: child\nextends: {extends}\n{own}", "child.yaml")
    with pytest.raises(RecipeError, match=rf"1 mistake:\n  .*{match}"):
        load_recipe(child)


def test_an_extends_that_leads_nowhere_does_not_hide_wrong_values(folder: Path) -> None:
    reported = mistakes(write(folder, "extends: nowhere.yaml\nseed: x\nfomrat: w8a8\nmethod: qat\n"))
    assert [line.split(": ")[1] for line in reported] == ["extends", "seed", "fomrat", "method"]


def test_a_long_chain_is_refused(folder: Path) -> None:
    write(folder, name="r0.yaml")
    for n in range(1, 20):
        write(folder, f"extends: r{n - 1}.yaml\nseed: {n}\n", f"r{n}.yaml")
    assert load_recipe(folder / "r15.yaml").recipe.seed == 15
    with pytest.raises(RecipeError, match=r"r4\.yaml:1: extends: r3\.yaml is a chain of over 16 files"):
        load_recipe(folder / "r19.yaml")


# --set --------------------------------------------------------------------------------------------


def test_overrides_are_laid_over_in_order(folder: Path) -> None:
    resolved = load_recipe(
        write(folder),
        [
            "seed=1",
            "seed=2",
            "train.lr.scale=3e-5",
            "train.phases.finetune={steps: 7}",
            "train.phases.finetune.lr=",
            'gate.float_floor."other.perplexity"=50',
            'format.layers."*.c_proj"=float',
            "data.train.text=[test.txt, other.txt]",
            "verify.samples=",
            "build.here=never",
            "export=",
        ],
    )
    recipe = resolved.recipe
    assert (recipe.seed, recipe.train.lr["scale"], recipe.train.phases["finetune"].steps) == (2, 3e-5, 7)
    assert recipe.train.phases["finetune"].lr == {}
    assert recipe.gate.float_floor == {"test.perplexity": 40, "other.perplexity": 50}
    assert list(recipe.format.layers)[-1] == "*.c_proj"
    assert recipe.data.train.text == ["test.txt", "other.txt"] and recipe.verify.samples is None
    assert recipe.export == Export() and recipe.build.here == "never"
    assert resolved.lines["seed"] == 0 and resolved.places[("seed",)].file == "--set"
    assert resolved.lines["train"] == 20 and resolved.lines["build.here"] == 0


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("seed", r"--set: seed: is not of the form key=value"),
        ("", r"--set: : is not of the form key=value"),
        ("=3", r"--set: =3: is not of the form key=value"),
        ("seed =3", r"--set: seed =3: is not of the form key=value"),
        ("seed=[1", r"--set: seed: column 3: "),
        ("seed=x", r"--set: seed: must be a whole number, found text 'x'"),
        ("seed.x=1", r"--set: seed: must be a whole number, found a mapping"),
        ("sead=1", r"--set: sead: unknown key \(fix: did you mean `seed`\?\)"),
        ("train.batch_sise=1", r"--set: train\.batch_sise: unknown key \(fix: did you mean `batch_size`\?\)"),
        ("trian.batch_size=1", r"--set: trian: unknown key \(fix: did you mean `train`\?\)"),
        ("export.dynamic[0]=batch", r"--set: export\.dynamic\[0\]=batch: names an item of a list"),
        ("extends=x.yaml", r"--set: extends=x\.yaml: cannot be overridden"),
        ("data.train.text=[no.txt]", r"--set: data\.train\.text\[0\]: .*no\.txt does not exist"),
        ("name=a: b", r"--set: name: must be text, found a mapping"),
    ],
)
def test_a_wrong_override_is_one_mistake(override: str, match: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=rf"1 mistake:\n  {match}"):
        load_recipe(write(folder), [override])


def test_an_override_mends_the_file(folder: Path) -> None:
    file = write(folder, edited("batch_size: 4", "batch_size: 0"))
    assert len(mistakes(file)) == 1
    assert mistakes(file, "train.batch_size=4") == []
