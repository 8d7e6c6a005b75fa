"""Tasks, one file each: data, loss and metrics. `TASKS` is the table of them."""

from __future__ import annotations

from qcompress.tasks import (
    causal_lm,
    feature_extraction,
    fill_mask,
    image_classification,
    question_answering,
    sequence_classification,
    token_classification,
)

TASKS = {
    "causal-lm": causal_lm,
    "sequence-classification": sequence_classification,
    "token-classification": token_classification,
    "image-classification": image_classification,
    "feature-extraction": feature_extraction,
    "fill-mask": fill_mask,
    "question-answering": question_answering,
}
