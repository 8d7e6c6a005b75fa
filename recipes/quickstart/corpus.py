"""The texts of the quickstart and the tokenizer that is trained on them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoTokenizer

SHAKESPEARE_TRAIN_SHARE = 0.9
WIKITEXT_EXCERPT_BYTES = 120_000

CONTEXT = 256
VOCAB = 2048
END_OF_TEXT = "<|endoftext|>"
SHAKESPEARE_REPEATS = 4
"""Shakespeare is a tenth of WikiText-2; repeated, it gets its share of the merges."""


@dataclass(frozen=True)
class Texts:
    """The texts as they are used; all but `wikitext_train` and `wikitext_test` are bundled."""

    shakespeare_train: str
    shakespeare_test: str
    wikitext_train: str
    wikitext_test: str
    wikitext_excerpt: str


def read_texts(shakespeare: Path, wikitext: Path) -> Texts:
    """Read both texts; split Shakespeare and cut the WikiText-2 excerpt at the end of a line."""
    play = shakespeare.read_bytes()
    split = play.rindex(b"\n", 0, int(len(play) * SHAKESPEARE_TRAIN_SHARE)) + 1
    wikitext_test = (wikitext / "wiki.test.tokens").read_bytes()
    excerpt = wikitext_test[: wikitext_test.rindex(b"\n", 0, WIKITEXT_EXCERPT_BYTES) + 1]
    return Texts(
        shakespeare_train=play[:split].decode("utf-8"),
        shakespeare_test=play[split:].decode("utf-8"),
        wikitext_train=(wikitext / "wiki.train.tokens").read_bytes().decode("utf-8"),
        wikitext_test=wikitext_test.decode("utf-8"),
        wikitext_excerpt=excerpt.decode("utf-8"),
    )


def write_texts(texts: Texts, folder: Path) -> None:
    """Write the bundled texts, byte for byte as they were read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("shakespeare-train.txt", texts.shakespeare_train),
        ("shakespeare-test.txt", texts.shakespeare_test),
        ("wikitext2-test.txt", texts.wikitext_excerpt),
    ):
        (folder / name).write_bytes(text.encode("utf-8"))


def train_tokenizer(texts: Texts) -> Tokenizer:
    """GPT-2's kind of tokenizer, with 2,048 tokens; `<|endoftext|>` is token 0."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    training = [texts.shakespeare_train] * SHAKESPEARE_REPEATS + [texts.wikitext_train]
    tokenizer.train_from_iterator(training, trainer)
    return tokenizer


def tokens(tokenizer: Tokenizer, text: str) -> Tensor:
    """Token ids of the whole text, [tokens]."""
    return torch.tensor(tokenizer.encode(text).ids)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write it so that transformers' AutoTokenizer, version 4 or 5, loads the folder without a network."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2TokenizerFast",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(config, folder / "tokenizer_config.json")


def check_tokenizer(tokenizer: Tokenizer, text: str, folder: Path) -> None:
    """Refuse a folder from which transformers reads another tokenizer than the one trained with."""
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, verbose=False)["input_ids"]
    if ids != tokenizer.encode(text).ids:
        raise ValueError(f"AutoTokenizer reads another tokenizer from {folder} than the one trained with")


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write beside `path`, then put it in its place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
