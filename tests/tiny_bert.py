"""Tiny encoders of each family, a stand-in for a task with labels, and the stages run on them.

As in `tiny.py` nothing is trivial: norms off 1, biases off 0, logits spread over several units.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import make_recipe, make_tokenizer
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    logging,
)

from qcompress.models import FAMILIES, describe, load_tokenizer
from qcompress.models.architecture import Architecture, Head
from qcompress.models.folded import assemble
from qcompress.models.plan import LayerPlan, PointPlan, plan_layers, plan_points
from qcompress.models.rebuild import rebuild
from qcompress.pipeline.stages.fold import fold
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.pipeline.stages.train import train
from qcompress.schema.recipe import Model, Recipe
from qcompress.system.artifacts import FloatModel, FoldedModel, TrainedModel
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS

VOCABULARY, WIDTH, HEADS, BLOCKS, CONTEXT = 300, 64, 2, 2, 32
LABELS = ("no", "yes", "maybe")
PADDING = 1
"""Token of the padding, in all families."""

SIZES = {
    "bert": BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
        intermediate_size=96, max_position_embeddings=CONTEXT, pad_token_id=PADDING,
    ),
    "roberta": RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
        intermediate_size=96, max_position_embeddings=CONTEXT + PADDING + 1, type_vocab_size=1,
        pad_token_id=PADDING,
    ),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY, dim=WIDTH, n_layers=BLOCKS, n_heads=HEADS, hidden_dim=96,
        max_position_embeddings=CONTEXT, pad_token_id=PADDING,
    ),
}  # fmt: skip

CLASSES: dict[tuple[str, str], type[PreTrainedModel]] = {
    ("bert", "sequence-classification"): BertForSequenceClassification,
    ("bert", "token-classification"): BertForTokenClassification,
    ("roberta", "sequence-classification"): RobertaForSequenceClassification,
    ("roberta", "token-classification"): RobertaForTokenClassification,
    ("distilbert", "sequence-classification"): DistilBertForSequenceClassification,
    ("distilbert", "token-classification"): DistilBertForTokenClassification,
}
SEQUENCE, TOKEN = "sequence-classification", "token-classification"
KINDS = tuple(CLASSES)


def make_encoder(family: str, task: str = SEQUENCE, seed: int = 0) -> PreTrainedModel:
    """A stock model with random weights that mean something."""
    config = SIZES[family].__class__.from_dict(
        SIZES[family].to_dict()
        | {
            "id2label": dict(enumerate(LABELS)),
            "label2id": {label: index for index, label in enumerate(LABELS)},
        }
    )
    config._attn_implementation = "eager"
    model = CLASSES[family, task](config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            norm = "norm" in name.lower() and name.endswith(".weight")
            parameter.copy_(1 + 0.2 * noise if norm else 0.15 * noise)
    return model


def save_encoder(folder: Path, text: Path, family: str, task: str = SEQUENCE, *, bare: bool = False) -> Path:
    """A checkpoint in transformers' layout with its tokenizer; `bare`: of the model without a head."""
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model = make_encoder(family, task)
    (model.base_model if bare else model).save_pretrained(folder)
    make_tokenizer(folder, text.read_text(encoding="utf-8"))
    name_padding(folder)
    return folder


def name_padding(folder: Path) -> None:
    """Make the token of the id `PADDING` the tokenizer's padding token."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["pad_token"] = next(token for token, number in vocabulary.items() if number == PADDING)
    file.write_text(json.dumps(config), encoding="utf-8")


def token_inputs(
    family: str, rows: int = 4, length: int = 12, pad: str = "", seed: int = 1
) -> dict[str, Tensor]:
    """Inputs of the family's graph: random tokens, and padding of several lengths on the side `pad`."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    for row in range(rows):
        if count := row * 2 if pad else 0:
            mask[row, :count] = 0 if pad == "left" else 1
            mask[row, length - count :] = 0 if pad == "right" else 1
    inputs = {"input_ids": torch.where(mask.bool(), ids, PADDING), "attention_mask": mask}
    if "token_type_ids" in FAMILIES[family].INPUTS:
        inputs["token_type_ids"] = (torch.arange(length) > length // 2).long().expand(rows, -1).contiguous()
    return FAMILIES[family].graph_inputs(**inputs)


@dataclass(frozen=True)
class StandIn:
    """Options of a task that needs no text: random padded sequences, labels that follow from a token."""

    family: str
    name: str = SEQUENCE
    context: int = CONTEXT


class StandInExamples:
    """32 sequences of several lengths."""

    def __init__(self, task: StandIn) -> None:
        self.task, self.notes, self.unit = task, [], "tokens"
        self.inputs = token_inputs(task.family, 32, 16, seed=5)
        self.lengths = np.random.default_rng(0).integers(4, 17, 32)
        mask = torch.arange(16) < torch.from_numpy(self.lengths)[:, None]
        self.inputs["attention_mask"] = mask.long()
        self.inputs["input_ids"] = torch.where(mask, self.inputs["input_ids"], PADDING)

    def __len__(self) -> int:
        return 32

    def batch(self, rows: Sequence[int], moment: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        rows = list(rows)
        longest = int(self.lengths[rows].max())
        batch = {name: tensor[rows, :longest] for name, tensor in self.inputs.items()}
        ids = batch["input_ids"] % len(LABELS)
        return {**batch, "labels": ids[:, 1] if self.task.name == SEQUENCE else ids}


class StandInTask:
    """What a task module has, as far as training needs it."""

    reader = staticmethod(load_tokenizer)

    @staticmethod
    def processor(task: StandIn) -> None:
        return None

    @staticmethod
    def examples(data: Any, base: Path, tokenizer: Any, task: StandIn) -> StandInExamples:
        return StandInExamples(task)

    @staticmethod
    def settled(task: StandIn, config: dict[str, Any]) -> StandIn:
        return task

    @staticmethod
    def head(task: StandIn) -> Head:
        return Head(task.name, LABELS, "single_label_classification")

    @staticmethod
    def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())

    @staticmethod
    def logits_of(task: StandIn, config: dict[str, Any]) -> tuple[int, int]:
        return CONTEXT, len(LABELS)


@dataclass(frozen=True)
class EncoderLine:
    """A recipe on its way through the stages, in one folder; `Line` of `tiny.py` for encoders."""

    recipe: Recipe
    folder: Path
    float_model: FloatModel
    architecture: Architecture
    plan: tuple[LayerPlan, ...]

    @property
    def family(self) -> str:
        return self.architecture.family

    @property
    def points(self) -> tuple[PointPlan, ...]:
        return plan_points(self.recipe, self.architecture)

    @property
    def trained(self) -> TrainedModel:
        return TrainedModel(self.folder / "train")

    @property
    def folded(self) -> FoldedModel:
        return FoldedModel(self.folder / "fold")

    def train(self) -> EncoderLine:
        """Run the stage."""
        self.trained.path.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(TASKS, self.recipe.task.name, StandInTask)
            train(self.float_model, self.recipe, self.folder, self.architecture, self.plan,
                  self.trained.path, Reporter(silent=True))  # fmt: skip
        return self

    def fold(self) -> EncoderLine:
        """Run the stage."""
        self.folded.path.mkdir()
        fold(self.float_model, self.trained, self.folded.path)
        return self

    def model(self, stage: str) -> torch.nn.Module:
        """The model as one of the stages float, train, fold left it."""
        if stage == "float":
            return FAMILIES[self.family].load_float(self.float_model.source, self.float_model.path)
        return rebuild(self.float_model, self.trained).model if stage == "train" else assemble(self.folded)

    def logits(self, stage: str, inputs: dict[str, Tensor]) -> Tensor:
        """Logits of one of the stages."""
        with torch.no_grad():
            return self.model(stage)(**inputs).logits


def encoder_line(
    folder: Path, source: Path, text: Path, family: str, task: str = SEQUENCE, seed: int = 0, **sections: Any
) -> EncoderLine:
    """Make a recipe (see `make_recipe`), run the stage `load` and lay the formats over the model."""
    options = {"model": {"family": family, "source": "unused"}, "seed": seed, **sections}
    recipe = make_recipe(text, **options).model_copy(update={"task": StandIn(family, task)})
    head = StandInTask.head(recipe.task)
    loaded = folder / "load"
    loaded.mkdir(parents=True)
    load(Model(family=family, source=str(source)), source, fingerprint(source), loaded, head, seed)
    architecture = describe(family, source, head)
    return EncoderLine(
        recipe=recipe,
        folder=folder,
        float_model=FloatModel(loaded, source=source),
        architecture=architecture,
        plan=plan_layers(recipe, architecture),
    )
