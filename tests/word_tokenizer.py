"""A BERT-like tokenizer small enough to follow by hand: one word, one token, `##` pieces for the rest.

Nothing in it is trivial: the padding token is not 0, the second text has token type 1, and a word of the form
`ab-cd` is two sub-tokens.
"""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, CLS, SEP, UNKNOWN = 3, 1, 2, 0
WORDS = ["good", "bad", "film", "a", "very", "paris", "is", "in", "rome", "anna"]
FIRST = 4
"""Id of the first word."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at blanks and inside words at dashes; `[CLS] a [SEP] b [SEP]`."""
    vocabulary = {"[UNK]": UNKNOWN, "[CLS]": CLS, "[SEP]": SEP, "[PAD]": PAD}
    vocabulary |= {word: FIRST + place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("-", "removed")]
    )
    marks = [("[CLS]", CLS), ("[SEP]", SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=marks,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
