"""Tokenizer of a checkpoint, read from its files: the ids of its tokens, and its padding token.

transformers imports torch, so a check before a run reads the files itself, in transformers' way. The package
`tokenizers`, if installed, encodes texts. No torch.
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
"""Roles of special tokens, in the order in which transformers adds missing ones."""

OF_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
           "mask_token": "[MASK]"}  # fmt: skip
OF_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
              "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip
DEFAULTS = {"bert": OF_BERT, "distilbert": OF_BERT, "roberta": OF_ROBERTA}
"""Default special tokens of transformers' tokenizer classes, by the prefix of the class name."""

WITHOUT_DEFAULT = ("tokenizersbackend", "pretrainedtokenizerfast", "gpt2")
"""Classes without a default padding token."""

AT_ONCE = 1000
"""Number of texts in one encoded batch."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Ids and special tokens of a tokenizer."""

    directory: Path
    ids: dict[str, int]
    """The id of every token."""
    special: dict[str, str]
    """Special tokens by role, such as pad_token."""
    inserted: tuple[str, ...]
    """Tokens that every sequence contains."""
    pads: bool | None
    """True with a padding token; None if the files leave it open."""

    def beyond(self, rows: int) -> dict[str, int]:
        """Tokens whose id is not a row of a table with this number of rows."""
        return {token: number for token, number in self.ids.items() if number >= rows}


def read_tokenizer(directory: Path, family: str) -> TokenizerFiles | None:
    """Read the tokenizer of a checkpoint; None if its vocabulary is not in a known file."""
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
    settings = defaults | specials | config
    special = {role: text for role in SPECIAL if (text := _content(settings.get(role))) is not None}
    pads: bool | None = "pad_token" in special
    if not pads and "pad_token" not in settings and not named.startswith(WITHOUT_DEFAULT):
        pads = None
    for text in special.values():
        ids.setdefault(text, len(ids))  # transformers adds a special token that the vocabulary lacks
    return TokenizerFiles(directory, ids, special, inserted, pads)


def first_with(
    files: TokenizerFiles, texts: Sequence[Any], tokens: dict[str, int], context: int | None
) -> tuple[int, str] | None:
    """Find the first text that is encoded with one of these tokens; returns its row and the token, or None.
    Raises ModuleNotFoundError without the package `tokenizers`.
    """
    tokenizer = _encoder(files)
    if context is not None:
        tokenizer.enable_truncation(context)
    names = {number: token for token, number in tokens.items()}
    for start in range(0, len(texts), AT_ONCE):
        batch = list(texts[start : start + AT_ONCE])
        words = isinstance(batch[0], list)
        for row, encoded in enumerate(tokenizer.encode_batch(batch, is_pretokenized=words), start):
            token = next((names[number] for number in encoded.ids if number in names), None)
            if token is not None:
                return row, token
    return None


def _check_whole(file: Path) -> None:
    """Refuse a tokenizer.json that the package `tokenizers`, if installed, cannot read."""
    if not file.exists():
        return
    try:
        import tokenizers
    except ImportError:
        return
    text = json.dumps(read_object(file))
    with reading(file, "it is not a tokenizer"):
        tokenizers.Tokenizer.from_str(text)


def _encoder(files: TokenizerFiles) -> Any:
    import tokenizers

    file = files.directory / "tokenizer.json"
    if file.is_file():
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        known = tokenizer.get_vocab(with_added_tokens=True)
        in_order = sorted(files.ids, key=files.ids.__getitem__)
        tokenizer.add_tokens([token for token in in_order if token not in known])
    elif (files.directory / "vocab.txt").is_file():
        config = _object(files.directory / "tokenizer_config.json")
        lower = config.get("do_lower_case", True) is not False
        tokenizer = tokenizers.BertWordPieceTokenizer(str(files.directory / "vocab.txt"), lowercase=lower)
    else:
        vocabulary, merges = (str(files.directory / name) for name in ("vocab.json", "merges.txt"))
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocabulary, merges))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens([token for token in files.special.values() if token in files.ids])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _vocabulary(directory: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Ids of the tokens, and the tokens that a post-processor inserts into every sequence."""
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
    """Tokens with their ids, from a mapping or a list (Unigram: token and score)."""
    if isinstance(vocabulary, dict):
        yield from ((token, number) for token, number in vocabulary.items() if isinstance(number, int))
    elif isinstance(vocabulary, list):
        for number, entry in enumerate(vocabulary):
            yield (str(entry[0]) if isinstance(entry, list) and entry else str(entry)), number


def _inserted(processor: dict[str, Any]) -> Iterator[str]:
    """Special tokens of a post-processor for one sequence: templates, and those of BERT and RoBERTa."""
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
    """Read a JSON object from a file; empty without the file."""
    return read_object(file) if file.exists() else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str | None:
    """Text of a token, which a file writes as text or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
