"""The tasks of GLUE (arXiv:1804.07461): labels, columns and official metrics, as plain values. No torch.

Two forms of the data are known: the published TSV files (tab-separated, quotes are literal characters, CoLA
without a header line), and the columns of the hub's `nyu-mll/glue`. Integer labels of both are indices into
`labels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """One task. `tsv` and `hub` name the columns of the text, its pair and its label."""

    labels: tuple[str, ...]
    """Names of the classes, in the order of their integers; empty for the regression task."""
    tsv: Mapping[str, str]
    hub: Mapping[str, str]
    main: tuple[str, ...] = ("accuracy",)
    """Official metrics, the main one first."""
    header: tuple[str, ...] | None = None
    """Column names of a TSV file without a header line."""


def _single_text(text: str, label: str = "label") -> dict[str, str]:
    return {"text": text, "label": label}


def _text_pair(text: str, pair: str, label: str = "label") -> dict[str, str]:
    return {"text": text, "pair": pair, "label": label}


ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = _text_pair("sentence1", "sentence2")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        ("unacceptable", "acceptable"),
        tsv=_single_text("sentence"),
        hub=_single_text("sentence"),
        main=("mcc",),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask(("negative", "positive"), tsv=_single_text("sentence"), hub=_single_text("sentence")),
    "mrpc": GlueTask(
        ("not_equivalent", "equivalent"),
        tsv=_text_pair("#1 String", "#2 String", "Quality"),
        hub=SENTENCES,
        main=("f1", "accuracy"),
    ),
    "stsb": GlueTask(
        (), tsv=_text_pair("sentence1", "sentence2", "score"), hub=SENTENCES, main=("spearman", "pearson")
    ),
    "rte": GlueTask(ENTAILMENT, tsv=SENTENCES, hub=SENTENCES),
    "qnli": GlueTask(
        ENTAILMENT, tsv=_text_pair("question", "sentence"), hub=_text_pair("question", "sentence")
    ),
    "qqp": GlueTask(
        ("not_duplicate", "duplicate"),
        tsv=_text_pair("question1", "question2", "is_duplicate"),
        hub=_text_pair("question1", "question2"),
    ),
    "mnli": GlueTask(
        ("entailment", "neutral", "contradiction"),
        tsv=_text_pair("sentence1", "sentence2", "gold_label"),
        hub=_text_pair("premise", "hypothesis"),
    ),
    "wnli": GlueTask(("not_entailment", "entailment"), tsv=SENTENCES, hub=SENTENCES),
}
"""Tasks of GLUE by the value of `task.glue`."""
