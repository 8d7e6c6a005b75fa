"""Laws of the two digests: the code a stage can run, and the key of what it was given."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcompress.errors import ContractError
from qcompress.system.fingerprint import PACKAGE, code_digest, differences, stage_key

FILES = {
    "__init__.py": "def run():\n    from qcompress.pipeline import run as go\n    return go()\n",
    "pipeline.py": "from qcompress import fold\n",
    "fold.py": (
        '"""Fold."""\nfrom __future__ import annotations\nimport json\nfrom typing import TYPE_CHECKING\n'
        "from qcompress.quant import affine\nfrom .plan import Plan\nif TYPE_CHECKING:\n"
        "    from qcompress.report import Report\nelse:\n    from . import late\n"
        'def fold():\n    """Do it."""\n    from qcompress.quant.lsq import scale  # where it is used\n'
        "    return scale * 2.5\n"
    ),
    "late.py": "",
    "plan.py": "class Plan:\n    '''A plan.'''\n    bits: int = 8\n    '''Help text.'''\n",
    "report.py": "import qcompress.nothing_of_this_name\n",
    "quant/__init__.py": "from ..errors import Oops\n\ndef lazy():\n    from qcompress.quant import heavy\n",
    "quant/affine.py": "def half(x):\n    return x / 2\n",
    "quant/lsq.py": "scale = 1\n",
    "quant/heavy.py": "",
    "errors.py": "class Oops(Exception):\n    pass\n",
    "methods/__init__.py": "",
    "methods/table.py": (
        "def choose(name):\n    try:\n        from .saq import Saq\n    except ValueError:\n"
        "        from qcompress.methods import squat\n    with open(name):\n        match name:\n"
        "            case 1:\n                import qcompress.methods.ipq as ipq\n"
    ),
    "methods/saq.py": "from qcompress.quant import lsq as q\n",
    "methods/squat.py": "",
    "methods/ipq.py": "",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "qcompress"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def edit(package: Path, name: str, old: str, new: str) -> None:
    text = (package / name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (package / name).write_text(text.replace(old, new), encoding="utf-8")


def test_the_walk_follows_imports_in_modules_functions_branches_and_relative_ones(package: Path) -> None:
    digests = code_digest(["qcompress.fold"], package=package)
    assert list(digests) == [
        "__init__.py",
        "errors.py",
        "fold.py",
        "late.py",
        "plan.py",
        "quant/__init__.py",
        "quant/affine.py",
        "quant/lsq.py",
    ]
    assert all(len(digest) == 64 for digest in digests.values())


def test_the_walk_goes_into_try_with_and_match(package: Path) -> None:
    digests = code_digest(["qcompress.methods.table"], package=package)
    assert {"methods/saq.py", "methods/squat.py", "methods/ipq.py", "quant/lsq.py"} <= digests.keys()


def test_left_out_modules_are_neither_counted_nor_walked(package: Path) -> None:
    digests = code_digest(["qcompress.methods.table"], {"qcompress.methods.saq"}, package=package)
    assert "methods/saq.py" not in digests
    assert "quant/lsq.py" not in digests
    assert "methods/squat.py" in digests
    left_out = code_digest(["qcompress.methods.table"], {"qcompress.methods"}, package=package)
    assert "methods/__init__.py" not in left_out
    assert "methods/saq.py" in left_out


def test_lazy_imports_of_a_package_count_once_a_name_of_it_is_imported(package: Path) -> None:
    assert "quant/heavy.py" not in code_digest(["qcompress.fold"], package=package)
    (package / "late.py").write_text("from qcompress.quant import lazy\n")
    assert "quant/heavy.py" in code_digest(["qcompress.fold"], package=package)


def test_a_plain_dotted_import_reaches_every_package_above(package: Path) -> None:
    (package / "late.py").write_text("import qcompress.methods.squat as squat\n")
    assert "pipeline.py" not in code_digest(["qcompress.late"], package=package)
    (package / "late.py").write_text("import qcompress.methods.squat\n")
    assert "pipeline.py" in code_digest(["qcompress.late"], package=package)


def test_a_package_without_init_lets_its_modules_in(package: Path) -> None:
    (package / "quant/__init__.py").unlink()
    digests = code_digest(["qcompress.fold"], package=package)
    assert "quant/lsq.py" in digests
    assert "quant/__init__.py" not in digests


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("fold.py", '"""Fold."""', '"""Quite another text.\n\nOver lines.\n"""'),
        ("fold.py", '    """Do it."""\n', ""),
        ("fold.py", "  # where it is used", "  # elsewhere"),
        ("fold.py", "return scale * 2.5", "return (\n        scale\n        * 2.50\n    )"),
        ("plan.py", "'''Help text.'''", '"Other help."'),
        ("quant/lsq.py", "scale = 1\n", "\n\n\nscale  =  1\n"),
    ],
)
def test_text_that_nothing_runs_does_not_change_the_digest(
    package: Path, name: str, old: str, new: str
) -> None:
    before = code_digest(["qcompress.fold"], package=package)
    edit(package, name, old, new)
    assert code_digest(["qcompress.fold"], package=package) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("fold.py", "2.5", "2.6"),
        ("fold.py", "scale * 2.5", "2.5 * scale"),
        ("fold.py", "return scale", "scale"),
        ("plan.py", "bits: int = 8", "bits: int = True"),
        ("plan.py", "bits: int = 8", "bits: int"),
        ("quant/lsq.py", "scale = 1", "scale = 1.0"),
        ("quant/lsq.py", "scale = 1", "scale = '1'"),
        ("quant/lsq.py", "scale = 1", "scale = None"),
        ("quant/affine.py", "def half(x)", "def half(x, *, y=0)"),
        ("errors.py", "Exception", "ValueError"),
    ],
)
def test_an_edit_of_code_changes_the_digest_of_its_file_alone(
    package: Path, name: str, old: str, new: str
) -> None:
    before = code_digest(["qcompress.fold"], package=package)
    edit(package, name, old, new)
    after = code_digest(["qcompress.fold"], package=package)
    assert after.keys() == before.keys()
    assert [file for file in before if before[file] != after[file]] == [name]


def test_names_that_do_not_exist_are_refused(package: Path) -> None:
    with pytest.raises(ContractError, match="asked about qcompress.flod"):
        code_digest(["qcompress.flod"], package=package)
    with pytest.raises(ContractError, match="asked about qcompress.methods.sqat"):
        code_digest(["qcompress.fold"], {"qcompress.methods.sqat"}, package=package)
    with pytest.raises(ContractError, match=r"qcompress\.report imports qcompress\.nothing_of_this_name"):
        code_digest(["qcompress.report"], package=package)


def test_the_walk_imports_nothing() -> None:
    program = (
        "import sys\nfrom qcompress.system.fingerprint import code_digest\nbefore = set(sys.modules)\n"
        "found = code_digest(['qcompress.schema.recipe', 'qcompress.models.gpt2'])\n"
        "new = set(sys.modules) - before\n"
        "print(len(found), sorted(name for name in new if name.startswith('qcompress')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, _, imported = done.stdout.strip().partition(" ")
    assert int(count) >= 6
    assert imported == "[]"


def test_the_walk_of_forty_files_is_fast(tmp_path: Path) -> None:
    text = (PACKAGE / "system" / "fingerprint.py").read_text(encoding="utf-8")
    package = tmp_path / "qcompress"
    package.mkdir()
    for index in range(40):
        follow = f"from qcompress.file{index + 1} import x\n" if index < 39 else ""
        (package / f"file{index}.py").write_text(f"{text}\nx = {index}\n{follow}", encoding="utf-8")
    (package / "errors.py").write_text("ContractError = ValueError\n")
    start = time.process_time()
    assert len(code_digest(["qcompress.file0"], package=package)) == 41
    # Measured: 0.2 s for 11000 lines. Loose: a wrong algorithm should fail, a busy machine should not.
    assert time.process_time() - start < 1.5


PARTS = {
    "recipe": "gpt2-w8a8",
    "values": {"format": {"weights": {"bits": 8, "block": None}, "compute": "fp32"}, "lr": 1e-3, "on": True},
    "code": {"fold.py": "a" * 64, "quant/lsq.py": "b" * 64},
    "versions": {"torch": "2.13.0", "numpy": "2.1.0"},
    "inputs": {"train": "c" * 64},
    "data": {"calibration": "d" * 64},
    "device": "cpu",
}


def changed(path: str, value: object) -> dict[str, object]:
    """PARTS with one value replaced, at `section.key.key` (file names hold dots, so `/` stays)."""
    copy: dict[str, object] = {
        name: dict(part) if isinstance(part, dict) else part for name, part in PARTS.items()
    }
    section, _, rest = path.partition(":")
    if not rest:
        return {**copy, section: value}
    node = copy[section]
    *above, last = rest.split(":")
    for key in above:
        node[key] = dict(node[key])
        node = node[key]
    node[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("values:format:weights:bits", 4, "format.weights.bits changed (8 -> 4)"),
        ("values:format:weights", "float", "format.weights changed"),
        ("values:lr", 1, "lr changed (0.001 -> 1)"),
        ("values:on", 1, "on changed (true -> 1)"),
        ("values:new", None, "new added"),
        ("code:quant/lsq.py", "e" * 64, "code: quant/lsq.py changed"),
        ("code:quant/new.py", "e" * 64, "code: quant/new.py added"),
        ("versions:torch", "2.14.0", "versions: torch changed (2.13.0 -> 2.14.0)"),
        ("inputs:train", "e" * 64, "inputs: train changed"),
        ("data:calibration", "e" * 64, "data: calibration changed"),
        ("device", "cuda", "device changed (cpu -> cuda)"),
        ("threads", 2, "threads added"),
    ],
)
def test_whatever_changes_the_key_is_named(path: str, value: object, words: str) -> None:
    other = changed(path, value)
    assert stage_key("fold", other) != stage_key("fold", PARTS)
    (changes,) = differences(PARTS, other)
    assert changes == words or (changes.startswith(words) and "{" in changes)
    (backwards,) = differences(other, PARTS)
    assert backwards.split(" ")[-1] in {"changed", "removed"} or "->" in backwards


def test_the_key_does_not_depend_on_the_recipe_name_or_on_order() -> None:
    backwards = {name: PARTS[name] for name in reversed(PARTS)}
    backwards["values"] = {name: PARTS["values"][name] for name in reversed(PARTS["values"])}
    assert stage_key("fold", backwards) == stage_key("fold", PARTS)
    assert stage_key("fold", changed("recipe", "another")) == stage_key("fold", PARTS)
    assert differences(PARTS, changed("recipe", "another")) == []
    assert stage_key("train", PARTS) != stage_key("fold", PARTS)


def test_changes_are_told_in_the_order_code_values_versions() -> None:
    other = changed("versions:torch", "2.14.0") | {
        "code": {"fold.py": "f" * 64},
        "values": {**PARTS["values"], "lr": 2e-3},
    }
    assert differences(PARTS, other) == [
        "code: fold.py changed",
        "code: quant/lsq.py removed",
        "lr changed (0.001 -> 0.002)",
        "versions: torch changed (2.13.0 -> 2.14.0)",
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), r"parts\.values: nan has no exact JSON form"),
        (float("-inf"), r"parts\.values: -inf has no exact JSON form"),
        ({"a": [1, {2: "x"}]}, r"parts\.values\.a\[1\]: key 2 is of type int"),
        ({"a": Path("x")}, r"parts\.values\.a: a value of type \w*Path has no exact JSON form"),
        ({"a": {"b"}}, r"parts\.values\.a: a value of type set"),
        (b"x", r"parts\.values: a value of type bytes"),
    ],
)
def test_what_json_cannot_say_exactly_is_refused_with_its_place(value: object, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        stage_key("fold", {"recipe": "r", "values": value})


def test_a_module_is_its_package_its_file_or_a_folder_in_this_order(tmp_path: Path) -> None:
    folder = tmp_path / "qcompress"
    for name, text in {
        "__init__.py": "",
        "both/__init__.py": "A = 1\n",
        "both.py": "A = 2\n",
        "file.py": "A = 3\n",
        "file/data.py": "A = 4\n",
        "root.py": "from qcompress import both, file\nfrom qcompress.file import data\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert list(code_digest(["qcompress.root"], package=folder)) == [
        "__init__.py", "both/__init__.py", "file.py", "file/data.py", "root.py",
    ]  # fmt: skip
