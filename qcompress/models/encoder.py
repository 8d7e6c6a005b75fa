"""Base of BERT, RoBERTa and DistilBERT: an encoder with bidirectional attention, and a head for a task.

Layers, in the order of the forward pass: the tables, per block query, key, value, attention output and the
two linear layers after it, then the head. The last layer of the head is of kind "head" and takes
`format.embeddings` like a table.

Rescaling sites: the value projection -> the attention's output projection, in every block. Not foldable:
  * the norm of the embeddings and both norms of a block: their outputs are read by linear layers and added
    to the residual as well, which would need an additional division node;
  * except the last norm, which only the head reads: it folds, but would change the block's output, which
    block-wise calibration and distillation compare, so it is not declared;
  * intermediate -> output of a block (a GELU in between), the pooler or the head's first layer -> the last
    one (a tanh; DistilBERT's ReLU lets positive factors through, but its head takes the formats of a table);
  * query and key: a factor would fold into the two of them, but neither reads the other, and no weight's
    input gains anything.

Quantization points: the operands of both attention matmuls, and the branch and the skip of each residual
addition.

A checkpoint is one of the bare model (names without the prefix), of the task's model, or of another task's:
additional tensors are ignored, and missing tensors of the head are `new_head`, drawn with the seed that the
load stage recorded. Torch is imported only inside functions that make a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcompress.errors import ModelError
from qcompress.models.architecture import (
    CAUSAL_LM,
    OPERANDS,
    Architecture,
    Attention,
    Head,
    Input,
    Layer,
    Point,
    Site,
    token_inputs,
)
from qcompress.models.config_checks import check_config, check_leftover, check_shapes, config_of, labels_of
from qcompress.models.layer_selection import Depth
from qcompress.models.pooling import KEY, EmbeddingHead

Shapes = dict[str, tuple[int, ...]]

CLASSES = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "feature-extraction": "Model",
    "fill-mask": "ForMaskedLM",
    "question-answering": "ForQuestionAnswering",
}
"""Tasks, and the suffixes of their model classes in transformers."""

TASKS = tuple(CLASSES)

FILL_MASK = "fill-mask"

CAUSAL = False
"""A token attends to all tokens."""


@dataclass(frozen=True)
class Encoder:
    """Names and structure of one family. Module names are relative to the model or to a block."""

    family: str
    title: str
    """Prefix of its class names."""
    width: str
    heads: str
    blocks: str
    inner: str
    """The four keys of config.json above."""
    types: bool
    """True if the graph has an input of token types."""
    type_table: bool
    stack: str
    """Module that lists the blocks."""
    attention: str
    operands: tuple[str, str, str]
    """Query, key and value layers, inside the attention."""
    output: str
    norms: tuple[str, str]
    """After the attention and after the block's linear layers."""
    linears: tuple[str, str]
    """The linear layers after the attention."""
    additions: tuple[str, str]
    """Prefixes of the names of the points at the two residual additions."""
    head: Mapping[str, tuple[str, ...]]
    """Layers after the encoder for each task with a head; the last one computes the logits."""
    masked: tuple[str, str, str] = ("", "", "")
    """Layer, norm and decoder (tied to the table of words) of the head that predicts masked tokens."""
    padding: int | None = None
    """Default id of the padding token, after which positions start; None: positions start at 0."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of the exported graph, each int64 [batch, sequence]."""
        return ("input_ids", "attention_mask", *(("token_type_ids",) if self.types else ()))

    def signature(self, config: dict[str, Any]) -> tuple[Input, ...]:
        """Inputs of the exported graph with their axes and types."""
        return token_inputs(self.inputs)

    def describe(
        self, config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], head: Head = CAUSAL_LM
    ) -> Architecture:
        """Architecture of a checkpoint with the head of a task, whose tensors are checked against it."""
        self._check_config(config, head)
        shapes = self._shapes(tensors)
        outputs = len(self.labels(config, tensors, head)) if self.head.get(head.task) else 0
        layers = self._layers(config, head.task, outputs)
        blocks = tuple(f"{self.family}.{self.stack}.{index}" for index in range(config[self.blocks]))
        width, normed = config[self.width], self._norms(config)
        normed += [self.masked[1]] if head.task == FILL_MASK else []
        new = self._check_shapes(layers, normed, shapes, head.task)
        norms = sum(2 * width for _ in normed)
        biases = sum(layer.out_features for layer in layers if layer.kind != "embedding")
        return Architecture(
            family=self.family,
            layers=tuple(layers),
            blocks=blocks,
            sites=tuple(self._value_site(block, width) for block in blocks),
            context=self.positions(config),
            vocabulary=config["vocab_size"],
            parameters=sum(layer.weights for layer in layers if not layer.tied_to) + norms + biases,
            attentions=tuple(self._attention(block) for block in blocks),
            points=tuple(Point(name, kind, width) for block in blocks for name, kind in self._points(block)),
            embeddings=f"{self.family}.embeddings",
            new_head=new,
        )

    def positions(self, config: dict[str, Any]) -> int:
        """Largest number of tokens in a sequence."""
        first = 0 if self.padding is None else config.get("pad_token_id", self.padding) + 1
        return config["max_position_embeddings"] - first

    def labels(
        self, config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], head: Head
    ) -> tuple[str, ...]:
        """Names of the logits: the task's, or else those of config.json."""
        last = self._shapes(tensors).get(f"{self.head[head.task][-1]}.weight")
        return labels_of(config, last[0] if last else None, head)

    def task_config(
        self, config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]], head: Head
    ) -> dict[str, Any]:
        """config.json of the task's model: its class, labels and problem type; or its pooling."""
        if isinstance(head, EmbeddingHead):
            pooled = {"pooling": head.pooling, "normalize": head.normalize}
            named = self.title + CLASSES[head.task]
            return {**config, "architectures": [named], "problem_type": head.problem, KEY: pooled}
        config = {key: value for key, value in config.items() if key != KEY}
        if head.task == FILL_MASK:
            return {**config, "architectures": [self.title + CLASSES[head.task]]}
        labels = self.labels(config, tensors, head)
        return config_of(config, self.title + CLASSES[head.task], labels, head)

    @property
    def depth(self) -> Depth:
        """Location of the blocks."""
        names = rf"(?:{self.family}\.)?{re.escape(self.stack)}\."
        return Depth(self.blocks, f"{self.family}.{self.stack}", names)

    def _check_config(self, config: dict[str, Any], head: Head) -> None:
        keys = [self.width, self.heads, self.blocks, self.inner, "max_position_embeddings", "vocab_size"]
        keys += ["type_vocab_size"] if self.type_table else []
        check_config(config, self.family, TASKS, head, keys)
        if config[self.width] % config[self.heads]:
            raise ModelError(
                f"config.json: {config[self.heads]} heads do not divide a width of {config[self.width]}"
            )
        self._check_padding(config)
        kind = config.get("position_embedding_type", "absolute")
        if kind != "absolute" or config.get("is_decoder") or config.get("add_cross_attention"):
            raise ModelError(
                "config.json asks for relative positions, a decoder or cross-attention, and this family is "
                "an encoder with absolute positions",
                fix="name another checkpoint",
            )

    def _check_padding(self, config: dict[str, Any]) -> None:
        """Refuse a padding id that is not a row of the table. Without an id no row is padding; a family whose
        positions are counted from it needs one.
        """
        number, rows = config.get("pad_token_id", self.padding or 0), config["vocab_size"]
        if number is None and self.padding is None:
            return
        if type(number) is not int or not 0 <= number < rows:
            need = "" if self.padding is None else ", and positions are counted from it"
            raise ModelError(
                f"config.json: pad_token_id is {json.dumps(number)}, and must be a row of the embedding "
                f"table (0 to {rows - 1}){need}",
                fix="write the id of the tokenizer's padding token as pad_token_id into config.json",
            )

    def _shapes(self, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Shapes:
        """Shapes by names without the prefix; the first BERTs call a norm's tensors gamma and beta."""
        ends = {"gamma": "weight", "beta": "bias"}
        return {
            re.sub(r"(?<=\.LayerNorm\.)(gamma|beta)$", lambda end: ends[end[0]], self._bare(name)): shape
            for name, (_, shape) in tensors.items()
        }

    def _bare(self, name: str) -> str:
        return name.removeprefix(f"{self.family}.")

    def _layers(self, config: dict[str, Any], task: str, labels: int) -> list[Layer]:
        width, inner, table = config[self.width], config[self.inner], f"{self.family}.embeddings"
        layers = [Layer(f"{table}.word_embeddings", "embedding", width, config["vocab_size"])]
        positions = config["max_position_embeddings"]
        layers.append(Layer(f"{table}.position_embeddings", "embedding", width, positions))
        if self.type_table:
            types = Layer(f"{table}.token_type_embeddings", "embedding", width, config["type_vocab_size"])
            layers.append(types)
        for index in range(config[self.blocks]):
            block = f"{self.family}.{self.stack}.{index}"
            names = [*(f"{self.attention}.{operand}" for operand in self.operands), self.output]
            layers += [Layer(f"{block}.{name}", "linear", width, width, part="attention") for name in names]
            layers.append(Layer(f"{block}.{self.linears[0]}", "linear", width, inner, part="ffn"))
            layers.append(Layer(f"{block}.{self.linears[1]}", "linear", inner, width, part="ffn"))
        if task == FILL_MASK:
            dense, _, decoder = self.masked
            tied = f"{table}.word_embeddings" if config.get("tie_word_embeddings", True) else None
            layers.append(Layer(dense, "linear", width, width))
            return [*layers, Layer(decoder, "head", width, config["vocab_size"], tied_to=tied)]
        head = self.head.get(task, ())
        layers += [Layer(name, "linear", width, width) for name in head[:-1]]
        return layers + [Layer(name, "head", width, labels) for name in head[-1:]]

    def _norms(self, config: dict[str, Any]) -> list[str]:
        blocks = [f"{self.family}.{self.stack}.{index}" for index in range(config[self.blocks])]
        after = [f"{block}.{norm}" for block in blocks for norm in self.norms]
        return [f"{self.family}.embeddings.LayerNorm", *after]

    def _attention(self, block: str) -> Attention:
        module = f"{block}.{self.attention}"
        query, key, value = (f"{module}.{name}" for name in self.operands)
        output, norm = f"{block}.{self.output}", f"{block}.{self.norms[0]}"
        return Attention(module, query, key, value, output, norm, block)

    def _value_site(self, block: str, width: int) -> Site:
        attention = self._attention(block)
        point = f"{attention.module}.value_point"
        return Site(attention.value, (attention.output,), width, kind="value", point=point)

    def _points(self, block: str) -> list[tuple[str, str]]:
        first, second = self.additions
        sides = ("branch_point", "skip_point")
        return [
            *((f"{block}.{self.attention}.{operand}", "attention") for operand in OPERANDS),
            *((f"{block}.{place}{side}", "residual") for place in (first, second) for side in sides),
        ]

    def _check_shapes(
        self, layers: list[Layer], norms: list[str], shapes: Shapes, task: str
    ) -> tuple[str, ...]:
        """Refuse a checkpoint whose tensors do not fit this model; returns the missing tensors of the
        head.
        """
        expected: Shapes = {}
        for layer in layers:
            if not layer.tied_to:
                expected[f"{layer.name}.weight"] = (layer.out_features, layer.in_features)
            if layer.kind != "embedding" and layer.name != self.masked[2]:  # its bias has two names
                expected[f"{layer.name}.bias"] = (layer.out_features,)
        for norm in norms:
            expected |= dict.fromkeys((f"{norm}.weight", f"{norm}.bias"), (layers[0].in_features,))
        new = tuple(
            f"{layer}.{part}"
            for layer in self.head.get(task, ())
            if self._bare(f"{layer}.weight") not in shapes and self._bare(f"{layer}.bias") not in shapes
            for part in ("weight", "bias")
        )
        present = {name: shapes[self._bare(name)] for name in expected if self._bare(name) in shapes}
        check_shapes(expected, present, new)
        own = set(map(self._bare, expected))
        check_leftover(name for name in shapes if name.startswith(f"{self.stack}.") and name not in own)
        return new
