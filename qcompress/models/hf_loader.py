"""Stock transformers models of the families with labels, of text and of images.

Torch and transformers are imported inside the functions: the table of families is read without them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import ModelError
from qcompress.models.architecture import OPERANDS
from qcompress.models.checkpoint_files import read_config
from qcompress.models.encoder import CLASSES, Encoder
from qcompress.models.finite import demand_finite
from qcompress.models.layer_selection import Depth, lacking, share_parameters
from qcompress.models.loading import reading, stock_config, stock_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
"""What makes the models of a task in transformers."""


@dataclass(frozen=True)
class Maker:
    """What makes stock models: names of classes, as `architectures` of a config.json has them, and the auto
    class of transformers that each is made by.
    """

    autos: Mapping[str, str]

    def of(self, directory: Path) -> tuple[Any, Any]:
        """The config of a directory, and what makes a stock model of its class."""
        import transformers

        named = (read_config(directory).get("architectures") or [None])[0]
        if named not in self.autos:
            raise ModelError(
                f"{directory}: config.json names the class {named}, which is none of {', '.join(self.autos)}",
                fix="load it through a recipe, whose task names the class",
            )
        return stock_config(directory), getattr(transformers, self.autos[named])


def load_model(
    maker: Maker, source: Path, directory: Path | None = None, depth: Depth | None = None
) -> PreTrainedModel:
    """The stock model of a task in fp32, in evaluation mode, from safetensors in a local directory.

    `directory` is the load stage's folder: its config.json names the task, and its float.json the seed of
    a new head. transformers fills missing tensors at random; anything but the new head, and what blocks share
    (`depth` says where they are), is refused.
    """
    place = directory or source
    config, _ = maker.of(place)
    file = place / "float.json"
    new = json.loads(file.read_text(encoding="utf-8")).get("new_head") if file.is_file() else None
    model, found = stock_model(config.architectures[0], source, place, config, attn_implementation="eager")
    missing = sorted(set(found["missing_keys"]) - set(new["tensors"] if new else ()))
    if depth is not None:
        missing = lacking(missing, model, depth)
    if missing:
        raise ModelError(
            f"{source}: the checkpoint lacks {', '.join(missing[:3])} ({len(missing)} tensors in all)",
            fix="take config.json and model.safetensors from the same checkpoint",
        )
    if new:
        _draw(model, new["tensors"], new["seed"])
    demand_finite(model, source)
    if depth is not None:
        share_parameters(model, depth)
    return model.eval()


def empty_model(maker: Maker, directory: Path, depth: Depth | None = None) -> PreTrainedModel:
    """The stock model of a config.json with unset weights; buffers are unset as well."""
    import torch

    config, stock = maker.of(directory)
    with torch.device("meta"), reading(directory / "config.json", "transformers makes no model of it"):
        model = stock.from_config(config, attn_implementation="eager").eval()
    if depth is not None:
        share_parameters(model, depth)
    return model


def put_points(model: nn.Module, points: Mapping[str, nn.Module]) -> None:
    """Put modules at points, by name: each is called with what it may round."""
    from qcompress.models.attention import open_attention
    from qcompress.models.residual import open_additions

    if any(name.endswith(OPERANDS) for name in points):
        open_attention(model)
    for name, module in points.items():
        place, _, child = name.rpartition(".")
        if child not in OPERANDS:
            above, _, own = place.rpartition(".")
            opened = open_additions(model.get_submodule(place))
            setattr(model.get_submodule(above), own, opened)
        setattr(model.get_submodule(place), child, module)


@dataclass(frozen=True)
class Stock:
    """Makes the models of one family of encoders of text."""

    names: Encoder

    @property
    def maker(self) -> Maker:
        """By the classes of the family's tasks."""
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
        """The stock model of a task, see `load_model`."""
        return load_model(self.maker, source, directory, self.names.depth)

    def empty(self, directory: Path) -> PreTrainedModel:
        """The stock model of a config.json with unset weights, to be filled by the caller."""
        import torch

        model = empty_model(self.maker, directory, self.names.depth)
        embeddings = model.get_submodule(f"{self.names.family}.embeddings")
        positions = torch.arange(model.config.max_position_embeddings).expand((1, -1))
        embeddings.position_ids = positions
        if hasattr(embeddings, "token_type_ids"):
            embeddings.token_type_ids = torch.zeros_like(positions)
        return model

    def tie(self, model: nn.Module) -> None:
        """Share what is float and was set after construction."""
        share_parameters(model, self.names.depth)

    def install_points(self, model: nn.Module, points: Mapping[str, nn.Module]) -> None:
        """Put modules at points, by name: each is called with what it may round."""
        put_points(model, points)


def _draw(model: nn.Module, names: list[str], seed: int) -> None:
    """Give tensors their starting values: weights from N(0, initializer_range), biases 0, as stock models
    do, but as a function of the seed alone.
    """
    import torch

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=random) * model.config.initializer_range
            parameter.copy_(noise if name.endswith(".weight") else torch.zeros(parameter.shape))
