"""A tokenizer read from its files, held against the one that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, RobertaTokenizer
from word_tokenizer import WORDS, word_tokenizer

from qcompress.errors import ModelError
from qcompress.models.readers import check_reader
from qcompress.models.tokenizer_files import first_with, read_tokenizer

TEXTS = ["a good film", "very-bad rome", "masterpiece of anna", "<mark> paris", ""]


def vocabulary(folder: Path, **config: Any) -> None:
    """vocab.txt, and tokenizer_config.json if there is something to say."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "master", "##piece"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def saved(folder: Path, **config: Any) -> None:
    """tokenizer.json, and other entries of tokenizer_config.json; None in the place of one removes it."""
    word_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text()) | config
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "removed"}))


def with_added(folder: Path, *tokens: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.save_pretrained(folder)


def byte_level(folder: Path) -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz", "\u0120"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


MAKERS: dict[str, tuple[str, Any]] = {
    "tokenizer.json": ("bert", saved),
    "no padding": ("bert", lambda folder: saved(folder, pad_token=None)),
    "padding that nobody names": ("bert", lambda folder: saved(folder, pad_token="removed")),
    "padding of the class": ("bert", lambda folder: saved(folder, pad_token="removed",
                                                          tokenizer_class="BertTokenizer")),
    "a class whose padding is null": ("bert", lambda folder: saved(folder, pad_token=None,
                                                                   tokenizer_class="BertTokenizer")),
    "padding beyond the vocabulary": ("bert", lambda folder: saved(folder, pad_token="<new>")),
    "added tokens": ("bert", lambda folder: with_added(folder, "masterpiece", "<mark>")),
    "vocab.txt alone": ("bert", vocabulary),
    "vocab.txt with capitals": ("bert", lambda folder: vocabulary(folder, do_lower_case=False)),
    "vocab.json and merges.txt": ("roberta", byte_level),
}  # fmt: skip


def made(what: str, folder: Path) -> str:
    family, make = MAKERS[what]
    make(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return family


@pytest.mark.parametrize("what", MAKERS)
def test_ids_and_padding_are_those_of_transformers(what: str, tmp_path: Path) -> None:
    family = made(what, tmp_path)
    ours, theirs = read_tokenizer(tmp_path, family), AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None and ours.pads == (theirs.pad_token_id is not None)
    assert ours.special.get("pad_token") == theirs.pad_token
    assert ours.ids == theirs.get_vocab()
    if ours.pads:
        assert ours.ids[ours.special["pad_token"]] == theirs.pad_token_id


@pytest.mark.parametrize("what", MAKERS)
@pytest.mark.parametrize("words", [False, True])
def test_a_token_beyond_the_table_is_found_where_transformers_has_it(
    what: str, words: bool, tmp_path: Path
) -> None:
    """For every size of the table: the first text with an id that is not a row of it."""
    family = made(what, tmp_path)
    ours, theirs = read_tokenizer(tmp_path, family), AutoTokenizer.from_pretrained(tmp_path)
    texts: list[Any] = [text.split() for text in TEXTS[:4]] if words else TEXTS
    if words and what == "vocab.json and merges.txt":
        theirs = RobertaTokenizer.from_pretrained(tmp_path, add_prefix_space=False)
    asked = 0
    for rows in range(1, len(ours.ids)):
        beyond = ours.beyond(rows)
        found = first_with(ours, texts, beyond, None)
        encoded = [
            theirs(text, is_split_into_words=words, add_special_tokens=True)["input_ids"] for text in texts
        ]
        special = set(theirs.all_special_ids)
        outside = [any(number >= rows and number not in special for number in ids) for ids in encoded]
        expected = outside.index(True) if any(outside) else None
        if found is None:
            assert expected is None, (rows, expected)
        elif beyond[found[1]] not in special:
            assert found[0] == expected
        asked += 1
    assert asked >= 10


def test_a_text_that_is_cut_is_looked_at_as_far_as_it_goes(tmp_path: Path) -> None:
    with_added(tmp_path, "masterpiece")
    found = read_tokenizer(tmp_path, "bert")
    beyond = found.beyond(14)
    assert beyond == {"masterpiece": 14}
    long = ["a film", "good " * 6 + "masterpiece"]
    assert first_with(found, long, beyond, None) == (1, "masterpiece")
    assert first_with(found, long, beyond, 9) == (1, "masterpiece")
    assert first_with(found, long, beyond, 8) is None


@pytest.mark.parametrize(
    ("family", "file", "fine"),
    [
        ("bert", "vocab.txt", True),
        ("distilbert", "vocab.txt", True),
        ("roberta", "vocab.txt", False),
        ("gpt2", "vocab.txt", False),
        ("roberta", "vocab.json", True),
        ("bert", "merges.txt", False),
    ],
)
def test_the_files_that_make_a_tokenizer(family: str, file: str, fine: bool, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    if fine:
        check_reader(family, tmp_path)
        return
    with pytest.raises(ModelError, match="holds no tokenizer") as refused:
        check_reader(family, tmp_path)
    assert "save_pretrained" in refused.value.fix


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_file_that_is_broken_is_named(name: str, content: str, tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=name):
        read_tokenizer(tmp_path, "bert")
