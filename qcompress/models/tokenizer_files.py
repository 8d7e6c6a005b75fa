"""A checkpoint's tokenizer, read from its files: the ids of its tokens, and its padding token.

transformers imports torch, so a check before a run reads the files itself, in the way in which transformers
reads them. The package `tokenizers` encodes texts where it is installed. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompress.models.checkpoint_files import read_object
from qcompress.models.loading import reading

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""In the order in which transformers adds those that a vocabulary lacks."""

OF_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
           "mask_token": "[MASK]"}  # fmt: skip
OF_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
              "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip
DEFAULTS = {"bert": OF_BERT, "distilbert": OF_BERT, "roberta": OF_ROBERTA}
"""Special tokens of a tokenizer's class in transformers, by the beginning of its name."""

WITHOUT_DEFAULT = ("tokenizersbackend", "pretrainedtokenizerfast", "gpt2")
"""Classes that have a padding token only where a file names one."""

AT_ONCE = 1000
"""Texts encoded together."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Ids and special tokens of a tokenizer."""

    directory: Path
    ids: dict[str, int]
    """The id of every token."""
    special: dict[str, str]
    """Special tokens by role, such as pad_token."""
    inserted: tuple[str, ...]
    """Tokens that stand in every sequence."""
    pads: bool | None
    """True with a padding token; None where the files do not say it."""

    def beyond(self, rows: int) -> dict[str, int]:
        """Tokens whose id is not a row of a table with so many rows."""
        return {token: number for token, number in self.ids.items() if number >= rows}


def read_tokenizer(directory: Path, family: str) -> TokenizerFiles | None:
    """The tokenizer of a checkpoint; None where its vocabulary is in no file that is known here."""
    config = _object(directory / "tokenizer_config.json")
    specials = _object(directory / "special_tokens_map.json")
    _check_whole(directory / "tokenizer.json")
    ids, inserted = _vocabulary(directory)
    if not ids:
        return None
    for number, token in _mapping(config.get("added_tokens_decoder")).items():
        if str(number).isdigit() and (text := _content(token)):
            ids.setdefault(text, int(number))
    named = str(config.get("tokenizer_class") or family).casefold()
    defaults = next((tokens for start, tokens in DEFAULTS.items() if named.startswith(start)), {})
    said = defaults | specials | config
    special = {role: text for role in SPECIAL if (text := _content(said.get(role))) is not None}
    pads: bool | None = "pad_token" in special
    if not pads and "pad_token" not in said and not named.startswith(WITHOUT_DEFAULT):
        pads = None
    for text in special.values():
        ids.setdefault(text, len(ids))  # transformers adds a special token that the vocabulary lacks
    return TokenizerFiles(directory, ids, special, inserted, pads)


def first_with(
    found: TokenizerFiles, texts: Sequence[Any], tokens: dict[str, int], context: int | None
) -> tuple[int, str] | None:
    """The first text that is encoded with one of these tokens: its row, and the token; None where there is
    no such text. Raises ModuleNotFoundError without the package `tokenizers`.
    """
    tokenizer = _encoder(found)
    if context is not None:
        tokenizer.enable_truncation(context)
    names = {number: token for token, number in tokens.items()}
    for start in range(0, len(texts), AT_ONCE):
        some = list(texts[start : start + AT_ONCE])
        words = isinstance(some[0], list)
        for row, encoded in enumerate(tokenizer.encode_batch(some, is_pretokenized=words), start):
            strange = next((names[number] for number in encoded.ids if number in names), None)
            if strange is not None:
                return row, strange
    return None


def _check_whole(file: Path) -> None:
    """Refuse a tokenizer.json that the package `tokenizers` does not read, where it is installed."""
    if not file.exists():
        return
    try:
        import tokenizers
    except ImportError:
        return
    text = json.dumps(read_object(file))
    with reading(file, "it is not a tokenizer"):
        tokenizers.Tokenizer.from_str(text)


def _encoder(found: TokenizerFiles) -> Any:
    import tokenizers

    file = found.directory / "tokenizer.json"
    if file.is_file():
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        known = tokenizer.get_vocab(with_added_tokens=True)
        in_order = sorted(found.ids, key=found.ids.__getitem__)
        tokenizer.add_tokens([token for token in in_order if token not in known])
    elif (found.directory / "vocab.txt").is_file():
        config = _object(found.directory / "tokenizer_config.json")
        lower = config.get("do_lower_case", True) is not False
        made = tokenizers.BertWordPieceTokenizer(str(found.directory / "vocab.txt"), lowercase=lower)
        tokenizer = made._tokenizer
    else:
        vocabulary, merges = (str(found.directory / name) for name in ("vocab.json", "merges.txt"))
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocabulary, merges))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens([token for token in found.special.values() if token in found.ids])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _vocabulary(directory: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """The ids of the tokens, and the tokens that a post-processor puts into every sequence."""
    whole = _object(directory / "tokenizer.json")
    if whole:
        ids = dict(_tokens(_mapping(whole.get("model")).get("vocab")))
        for token in whole.get("added_tokens") or ():
            if isinstance(token, dict) and isinstance(token.get("id"), int):
                ids[str(token.get("content"))] = token["id"]
        return ids, tuple(dict.fromkeys(_inserted(_mapping(whole.get("post_processor")))))
    if (directory / "vocab.txt").is_file():
        lines = (directory / "vocab.txt").read_text(encoding="utf-8").split("\n")
        lines = lines[:-1] if lines and not lines[-1] else lines
        return {token: number for number, token in enumerate(lines)}, ("[CLS]", "[SEP]")
    ids = dict(_tokens(_object(directory / "vocab.json")))
    return ids | dict(_tokens(_object(directory / "added_tokens.json"))), ()


def _tokens(vocabulary: Any) -> Iterator[tuple[str, int]]:
    """Tokens with their ids, of a mapping or of a list (Unigram: token and score)."""
    if isinstance(vocabulary, dict):
        yield from ((token, number) for token, number in vocabulary.items() if isinstance(number, int))
    elif isinstance(vocabulary, list):
        for number, entry in enumerate(vocabulary):
            yield (str(entry[0]) if isinstance(entry, list) and entry else str(entry)), number


def _inserted(processor: dict[str, Any]) -> Iterator[str]:
    """Special tokens of a post-processor for one sequence: templates, and BERT's and RoBERTa's own."""
    for inner in processor.get("processors") or ():
        yield from _inserted(_mapping(inner))
    for step in processor.get("single") or ():
        token = _mapping(_mapping(step).get("SpecialToken")).get("id")
        if token is not None:
            yield str(token)
    for name in ("cls", "sep"):
        if isinstance(processor.get(name), list) and processor[name]:
            yield str(processor[name][0])


def _object(file: Path) -> dict[str, Any]:
    """A JSON object of a file; empty without the file."""
    return read_object(file) if file.exists() else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str | None:
    """A token as a file writes it: text, or an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
