"""Loader of stock transformers models for the families with labels, of text and of images.

Torch and transformers are imported inside the functions: the table of families is read without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import ModelError
from qcompress.models.architecture import OPERANDS
from qcompress.models.checkpoint_files import read_config
from qcompress.models.encoder import CLASSES, Encoder
from qcompress.models.layer_selection import Depth, lacking, share_parameters
from qcompress.models.loading import complete, reading, stock_config, stock_model
from qcompress.models.pooling import KEY

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

AUTO = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
"""transformers' auto class for each task."""


@dataclass(frozen=True)
class Maker:
    """Constructor of stock models: maps class names, as in `architectures` of a config.json, to
    transformers' auto classes.
    """

    autos: Mapping[str, str]

    def of(self, directory: Path) -> tuple[Any, Any]:
        """Config of a directory, and the auto class that makes its stock model. Raises ModelError for
        another class.
        """
        import transformers

        config = read_config(directory)
        named = (config.get("architectures") or [None])[0]
        if named not in self.autos or (self.autos[named] == AUTO["feature-extraction"] and KEY not in config):
            raise ModelError(
                f"{directory}: config.json names the class {named}, which is not one of "
                f"{', '.join(self.autos)}",
                fix="load it through a recipe, whose task selects the class",
            )
        return stock_config(directory), getattr(transformers, self.autos[named])

    def task(self, directory: Path) -> str | None:
        """Task of the class of a directory; None for a class without one."""
        named = (read_config(directory).get("architectures") or [None])[0]
        return next((task for task, auto in AUTO.items() if auto == self.autos.get(named)), None)


def load_model(
    maker: Maker, source: Path, directory: Path | None = None, depth: Depth | None = None
) -> PreTrainedModel:
    """Load the stock model of a task in fp32, in evaluation mode, from safetensors in a local directory.

    `directory` is the load stage's folder: its config.json names the task, and its float.json the seed of a
    new head. Missing tensors raise ModelError, except those of the new head and those that blocks share
    (located by `depth`).
    """
    folder = directory or source
    config, _ = maker.of(folder)
    model, loading_info = stock_model(
        config.architectures[0], source, folder, config, attn_implementation="eager"
    )
    missing = loading_info["missing_keys"]
    if KEY in read_config(folder):
        prefix = f"{model.base_model_prefix}."
        missing = {prefix + name for name in missing if not name.startswith("pooler.")}
    model = for_task(model, maker, folder, source)
    if depth is not None:
        missing = lacking(missing, model, depth)
    complete(model, source, folder, missing, model.config.initializer_range)
    if depth is not None:
        share_parameters(model, depth)
    return model.eval()


def for_task(model: PreTrainedModel, maker: Maker, directory: Path, source: Path) -> nn.Module:
    """Give a stock model the outputs of its task under the name `logits`, as most models have them.
    `directory` has the config.json, `source` is the checkpoint that messages name.
    """
    if pooled := read_config(directory).get(KEY):
        from qcompress.models.text_embedder import embedder

        return embedder(model, pooled)
    return with_logits(model, maker.task(directory), source)


def with_logits(model: PreTrainedModel, task: str | None, source: Path) -> PreTrainedModel:
    """Give a stock model of masked tokens or of answers its logits; `source` is the checkpoint that messages
    name.
    """
    if task == "fill-mask":
        from qcompress.models.masked_lm import separate_bias

        separate_bias(model, source)
    if task == "question-answering":
        model.register_forward_hook(_both_ends)
    return model


def _both_ends(model: nn.Module, inputs: Any, output: Any) -> Any:
    """Logits [batch, tokens, 2] of a model that gives those of the first and of the last token apart."""
    import torch

    output.logits = torch.stack([output.start_logits, output.end_logits], -1)
    return output


def empty_model(maker: Maker, directory: Path, depth: Depth | None = None) -> PreTrainedModel:
    """Stock model of a config.json with unset weights and buffers."""
    import torch

    config, stock = maker.of(directory)
    with torch.device("meta"), reading(directory / "config.json", "transformers cannot make a model from it"):
        model = stock.from_config(config, attn_implementation="eager")
    model = for_task(model, maker, directory, directory).eval()
    if depth is not None:
        share_parameters(model, depth)
    return model


def put_points(model: nn.Module, points: Mapping[str, nn.Module]) -> None:
    """Install quantization points by name; each module receives the activation to quantize."""
    from qcompress.models.attention import open_attention
    from qcompress.models.residual import open_additions

    if any(name.endswith(OPERANDS) for name in points):
        open_attention(model)
    for name, module in points.items():
        parent, _, child = name.rpartition(".")
        if child not in OPERANDS:
            above, _, attribute = parent.rpartition(".")
            opened = open_additions(model.get_submodule(parent))
            setattr(model.get_submodule(above), attribute, opened)
        setattr(model.get_submodule(parent), child, module)


@dataclass(frozen=True)
class Stock:
    """Loader of the models of one family of text encoders."""

    names: Encoder

    @property
    def maker(self) -> Maker:
        """Constructor for the classes of the family's tasks."""
        return Maker({self.names.title + end: AUTO[task] for task, end in CLASSES.items()})

    def graph_inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Inputs of the exported graph for token ids [batch, sequence]; padding has mask 0."""
        import torch

        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if self.names.types:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            inputs["token_type_ids"] = types
        return inputs

    def load_float(self, source: Path, directory: Path | None = None) -> PreTrainedModel:
        """Load the stock model of a task; see `load_model`."""
        return load_model(self.maker, source, directory, self.names.depth)

    def empty(self, directory: Path) -> PreTrainedModel:
        """Stock model of a config.json with unset weights, to be filled by the caller."""
        import torch

        model = empty_model(self.maker, directory, self.names.depth)
        embeddings = model.get_submodule(f"{self.names.family}.embeddings")
        positions = torch.arange(model.config.max_position_embeddings).expand((1, -1))
        embeddings.position_ids = positions
        if hasattr(embeddings, "token_type_ids"):
            embeddings.token_type_ids = torch.zeros_like(positions)
        return model

    def tie(self, model: nn.Module) -> None:
        """Share float tensors that were set after construction."""
        share_parameters(model, self.names.depth)
        if hasattr(model, "output_bias"):
            from qcompress.models.masked_lm import tie_decoder

            tie_decoder(model)

    def install_points(self, model: nn.Module, points: Mapping[str, nn.Module]) -> None:
        """Install quantization points by name; each module receives the activation to quantize."""
        put_points(model, points)
