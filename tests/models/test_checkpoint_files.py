"""Checkpoints as files: what is read from headers alone, and every kind of file that is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from qcompress.errors import ModelError
from qcompress.models import describe
from qcompress.models.checkpoint_files import (
    HEADER_LIMIT,
    read_config,
    read_header,
    read_tensors,
    weight_files,
)
from qcompress.models.gpt2 import describe as describe_gpt2


@pytest.fixture
def copy(tmp_path: Path, tiny_model: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    return folder


@pytest.fixture
def sharded(tmp_path: Path, tiny_model: Path) -> Path:
    folder = tmp_path / "sharded"
    GPT2LMHeadModel.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_a_header_tells_names_types_and_shapes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(4, dtype=torch.float16),
        "c": torch.zeros((), dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    assert read_header(tmp_path / "x.safetensors") == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
        "c": ("I8", ()),
    }


def test_shards_and_one_file_are_the_same_checkpoint(sharded: Path, tiny_model: Path) -> None:
    assert read_tensors(sharded) == read_tensors(tiny_model)
    assert len(weight_files(sharded)) > 2 and weight_files(tiny_model) == [tiny_model / "model.safetensors"]
    assert describe("gpt2", sharded) == describe("gpt2", tiny_model)


def spoil_header(file: Path, text: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(text)) + text)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "not a readable safetensors file"),
    "too short for a length": (lambda file: file.write_bytes(b"abc"), "not a readable safetensors file"),
    "a huge header": (
        lambda file: file.write_bytes(struct.pack("<Q", HEADER_LIMIT + 1)),
        "header of [0-9]+ bytes",
    ),
    "a header that is no JSON": (lambda file: spoil_header(file, b"{{{{"), "not a readable safetensors file"),
    "a header that is no text": (
        lambda file: spoil_header(file, b"\xff\xfe\xff"),
        "not a readable safetensors file",
    ),
    "a header that is a list": (
        lambda file: spoil_header(file, b"[1, 2]"),
        "not a readable safetensors file",
    ),
    "an entry without a shape": (
        lambda file: spoil_header(file, b'{"a": {"dtype": "F32", "data_offsets": [0, 0]}}'),
        "not a readable safetensors file",
    ),
    "an entry that is a number": (
        lambda file: spoil_header(file, b'{"a": 3}'),
        "not a readable safetensors file",
    ),
    "data cut off": (lambda file: file.write_bytes(file.read_bytes()[:-1000]), "its header promises [0-9]+"),
    "header cut off": (
        lambda file: file.write_bytes(file.read_bytes()[:500]),
        "not a readable safetensors file",
    ),
    "data appended": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "its header promises [0-9]+"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_file_that_is_not_whole_is_refused(copy: Path, how: str) -> None:
    spoil, message = SPOILED[how]
    spoil(copy / "model.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        read_tensors(copy)
    assert "model.safetensors" in str(caught.value) and "save_pretrained" in caught.value.fix


def test_a_pickle_checkpoint_is_refused_with_the_way_to_convert_it(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin is a pickle file") as caught:
        describe("gpt2", copy)
    assert (
        "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory)" in caught.value.fix
    )


def test_a_directory_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no model.safetensors"):
        weight_files(copy)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(copy: Path, name: str) -> None:
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": name, "b": "x.safetensors"}})
    )
    with pytest.raises(ModelError, match="names files outside its directory"):
        read_tensors(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json (is not|must hold)"):
        read_tensors(copy)


@pytest.mark.parametrize("name", ["..", "model-00009-of-00009.safetensors"])
def test_a_missing_shard_is_refused_by_name(sharded: Path, name: str) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.wte.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"{name} is missing"):
        read_tensors(sharded)


def test_a_config_that_cannot_be_read_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json is not valid JSON"):
        read_config(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match="holds no config.json"):
        read_config(copy)


@pytest.mark.parametrize("text", ["[]", "3", '"gpt2"'])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="must hold a JSON object"):
        read_config(tmp_path)


def test_a_config_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ModelError, match="is not valid JSON"):
        read_config(tmp_path)


def test_a_boolean_is_no_number_of_layers() -> None:
    config = {"model_type": "gpt2", "n_layer": True, "n_embd": 8, "n_positions": 8, "vocab_size": 8}
    with pytest.raises(ModelError, match="n_layer must be a positive integer, found True"):
        describe_gpt2(config, {})
