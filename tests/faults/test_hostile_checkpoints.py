"""Hostile and broken checkpoints: `check` names what is wrong, with exit code 2."""

from __future__ import annotations

import json
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attacked import attacked, refused
from lines import cli, make_project

from qcompress.errors import ModelError
from qcompress.models import describe
from qcompress.models.architecture import CAUSAL_LM, Head

pytestmark = pytest.mark.attack("hostile and broken checkpoints")

TEXTS = ("bert", "roberta", "distilbert")

Header = dict[str, Any]
BIAS = "transformer.h.0.ln_1.bias"
TWIN = "transformer.h.1.ln_1.bias"


def header(change: Callable[[Header], object]) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "model.safetensors"
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        values = json.loads(raw[8 : 8 + length])
        change(values)
        text = json.dumps(values).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return spoil


def entry(key: str, value: object) -> Callable[[Path], None]:
    return header(lambda values: values[BIAS].update({key: value}))


def config(**values: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return spoil


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content)


def move(values: Header, by: int) -> None:
    values[BIAS]["data_offsets"] = [place + by for place in values[BIAS]["data_offsets"]]


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "overlap": (
        header(lambda values: values[TWIN].update(data_offsets=values[BIAS]["data_offsets"])),
        "overlaps",
    ),
    "shifted": (header(lambda values: move(values, 4)), "gap behind"),
    "negative offset": (header(lambda values: move(values, -(10**9))), "data_offsets"),
    "offsets reversed": (header(lambda values: values[BIAS]["data_offsets"].reverse()), "data_offsets"),
    "offsets of floats": (entry("data_offsets", [0.0, 256.0]), "data_offsets"),
    "one offset": (entry("data_offsets", [0]), "safetensors"),
    "negative shape": (entry("shape", [-64]), "integers from 0"),
    "two negatives": (entry("shape", [-8, -8]), "integers from 0"),
    "2^62": (entry("shape", [2**62, 2**62]), "takes"),
    "2^64": (entry("shape", [2**64]), "integers from 0"),
    "a boolean": (entry("shape", [True, 64]), "integers from 0"),
    "a float": (entry("shape", [64.0]), "integers from 0"),
    "a text": (entry("shape", "64"), "integers from 0"),
    "too small": (entry("shape", [63]), "takes 256 bytes"),
    "unknown type": (entry("dtype", "EVIL"), "EVIL"),
    "type of a list": (entry("dtype", ["F32"]), "not one of safetensors"),
    "int32": (
        header(lambda values: values["transformer.wte.weight"].update(dtype="I32")),
        "transformer.wte.weight is of the type I32",
    ),
    "metadata of numbers": (header(lambda values: values.update(__metadata__={"a": 1})), "__metadata__"),
    "deep header": (
        write("model.safetensors", struct.pack("<Q", 10**6) + b'{"a":' * (2 * 10**5)),
        "safetensors",
    ),
    "list config": (write("config.json", b"[1]"), "JSON object"),
    "deep config": (write("config.json", b"[" * 10**6), "not valid JSON"),
    "binary config": (write("config.json", bytes(range(256))), "not valid JSON"),
    "empty config": (write("config.json", b""), "not valid JSON"),
    "BOM": (write("config.json", b"\xef\xbb\xbf{}"), "byte order mark"),
    "no heads": (config(n_head=0), "n_head"),
    "negative heads": (config(n_head=-2), "n_head"),
    "text epsilon": (config(layer_norm_epsilon="1e-5"), "layer_norm_epsilon"),
    "unknown activation": (config(activation_function="evil"), "activation_function"),
    "one block more": (config(n_layer=3), "no such tensor"),
    "vocab_size": (config(vocab_size=10**12), "wte"),
    "n_positions": (config(n_positions=10**12), "wpe"),
    "torn tokenizer": (write("tokenizer.json", b'{"model":'), "tokenizer.json"),
    "tokenizer of numbers": (write("tokenizer.json", b'{"model": 3}'), "not a tokenizer"),
    "tokenizer of no type": (write("tokenizer.json", b'{"model": {"type": "Evil"}}'), "not a tokenizer"),
    "empty tokenizer": (write("tokenizer.json", b"{}"), "not a tokenizer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOSTILE)
def test_check_says_what_is_wrong(how: str, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", tiny_model, text_file)
    spoil, word = HOSTILE[how]
    spoil(project.folder / "model")
    done = cli("check", str(project.recipe))
    text = done.stdout + done.stderr
    assert done.code == 2 and word in text and "Traceback" not in text, text


def million(model: Path) -> None:
    def fill(values: Header) -> None:
        end = max(value["data_offsets"][1] for name, value in values.items() if name != "__metadata__")
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
        values.update({f"z.{number}": empty for number in range(10**6)})

    header(fill)(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "word"),
    [(config(n_layer=10**7), "n_layer"), (config(n_layer=10**12), "n_layer"), (million, "1000")],
    ids=["blocks", "more blocks", "tensors"],
)
def test_large_claims_cost_little(
    spoil: Callable[[Path], object], word: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", tiny_model, text_file)
    spoil(project.folder / "model")
    ended = attacked("check", project.recipe)
    assert ended.code == 2 and word in ended.text and "Traceback" not in ended.text, ended.text[-2000:]
    assert ended.peak_mib < 500 and ended.seconds < 10  # 5 s where the machine is idle


HUGE = [
    ("gpt2", "n_layer", 10**7), ("gpt2", "n_layer", 10**300), ("gpt2", "vocab_size", 10**12),
    ("gpt2", "n_positions", 10**12), ("gpt2", "n_embd", 10**400), ("gpt2", "n_head", 10**400),
    *((family, key, value) for family in ("bert", "roberta") for key, value in
      (("num_hidden_layers", 10**7), ("vocab_size", 10**12), ("max_position_embeddings", 10**12),
       ("type_vocab_size", 10**12))),
    ("distilbert", "n_layers", 10**7), ("distilbert", "vocab_size", 10**12),
    ("distilbert", "max_position_embeddings", 10**12),
    ("vit", "num_hidden_layers", 10**7), ("vit", "image_size", 10**12), ("vit", "hidden_size", 10**12),
    ("resnet", "depths", [10**7, 1]), ("resnet", "hidden_sizes", [10**12, 10**12]),
    ("efficientnet", "num_block_repeats", [10**7] * 7), ("efficientnet", "depth_coefficient", 1e300),
    ("efficientnet", "width_coefficient", 1e308), ("efficientnet", "depth_divisor", 10**400),
    ("efficientnet", "depth_coefficient", 999.0), ("efficientnet", "squeeze_expansion_ratio", 1e308),
    ("mobilenet-v2", "depth_multiplier", 1e308), ("mobilenet-v2", "expand_ratio", 999.0),
    ("mobilenet-v2", "depth_divisible_by", 10**400), ("mobilenet-v2", "min_depth", 10**12),
    ("cifar-resnet", "depth", 6 * 10**7 + 2), ("cifar-resnet", "depth", 6 * 10**399 + 2),
    ("cifar-resnet", "num_channels", 10**12),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "key", "value"), HUGE, ids=[f"{one[0]}-{one[1]}-{place}" for place, one in enumerate(HUGE)]
)
def test_huge_sizes_are_held_against_the_header_first(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, key: str, value: object
) -> None:
    """Described as `check` does it."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints[family], model)
    config(**{key: value})(model)
    task = "sequence-classification" if family in TEXTS else "image-classification"
    head = CAUSAL_LM if family == "gpt2" else Head(task, None, None)
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(ModelError) as caught:
            describe(family, model, head)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < 5 and peak < 100 * 2**20
    assert len(caught.value.message) < 600


def test_a_folder_in_the_place_of_config_json_is_refused(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", tiny_model, text_file)
    (project.folder / "model" / "config.json").unlink()
    (project.folder / "model" / "config.json").mkdir()
    refused(attacked("check", project.recipe), 2, "config.json")
