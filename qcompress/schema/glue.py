"""The tasks of GLUE (arXiv:1804.07461): labels, columns and official metrics, as plain values. No torch.

Two forms of the same data are known: the TSV files that were published (tab-separated, quotes are literal
characters, CoLA without a header line), and the columns of the hub's `nyu-mll/glue`. Integers of both are
indices into `labels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """One task. `tsv` and `hub` name the columns of the text, its pair and its label."""

    labels: tuple[str, ...]
    """Names of the classes, in the order of their integers; empty for the one regression."""
    tsv: Mapping[str, str]
    hub: Mapping[str, str]
    main: tuple[str, ...] = ("accuracy",)
    """The official metrics, the first first."""
    header: tuple[str, ...] | None = None
    """Names of the columns of a TSV file that has no header line."""


def _one(text: str, label: str = "label") -> dict[str, str]:
    return {"text": text, "label": label}


def _two(text: str, pair: str, label: str = "label") -> dict[str, str]:
    return {"text": text, "pair": pair, "label": label}


ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = _two("sentence1", "sentence2")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        ("unacceptable", "acceptable"),
        tsv=_one("sentence"),
        hub=_one("sentence"),
        main=("mcc",),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask(("negative", "positive"), tsv=_one("sentence"), hub=_one("sentence")),
    "mrpc": GlueTask(
        ("not_equivalent", "equivalent"),
        tsv=_two("#1 String", "#2 String", "Quality"),
        hub=SENTENCES,
        main=("f1", "accuracy"),
    ),
    "stsb": GlueTask(
        (), tsv=_two("sentence1", "sentence2", "score"), hub=SENTENCES, main=("spearman", "pearson")
    ),
    "rte": GlueTask(ENTAILMENT, tsv=SENTENCES, hub=SENTENCES),
    "qnli": GlueTask(ENTAILMENT, tsv=_two("question", "sentence"), hub=_two("question", "sentence")),
    "qqp": GlueTask(
        ("not_duplicate", "duplicate"),
        tsv=_two("question1", "question2", "is_duplicate"),
        hub=_two("question1", "question2"),
    ),
    "mnli": GlueTask(
        ("entailment", "neutral", "contradiction"),
        tsv=_two("sentence1", "sentence2", "gold_label"),
        hub=_two("premise", "hypothesis"),
    ),
    "wnli": GlueTask(("not_entailment", "entailment"), tsv=SENTENCES, hub=SENTENCES),
}
"""`task.glue` is a row of this table."""
