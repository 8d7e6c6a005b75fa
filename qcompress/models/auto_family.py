"""Families of discovered architectures: every model of some of transformers' auto classes.

Layers, blocks, rescaling sites, points and the key-value cache are found by running a reduced model
(`structure/`); nothing about an architecture is written here. Torch and transformers are imported only inside
functions that make a model.

Quantization points: the operands of both matmuls of each attention that calls transformers' attention
interface. The residual stream has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import ModelError
from qcompress.models.architecture import (
    CAUSAL_LM,
    OPERANDS,
    PIXELS,
    Architecture,
    CacheLayout,
    Head,
    Input,
    Layer,
    Point,
    image_inputs,
    token_inputs,
)
from qcompress.models.checkpoint_files import read_config
from qcompress.models.config_checks import config_of, labels_of
from qcompress.models.config_values import check_values
from qcompress.models.convnet import COUNTED
from qcompress.models.hf_loader import put_points, with_logits
from qcompress.models.layer_selection import Names, Tensors
from qcompress.models.loading import FORMS, complete, reading, stock_config, stock_model
from qcompress.models.pooling import KEY, EmbeddingHead
from qcompress.models.python_source import PYTHON, filled_module
from qcompress.models.structure.kept import Discovered, structure_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
"""Keys of config.json with the largest number of tokens."""

COUNTED_FROM_PADDING = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text",
    "roberta-prelayernorm", "xmod", "esm", "ibert",
)  # fmt: skip
"""Types of models whose first position is the padding id + 1, as in fairseq."""

UNLIMITED = 2**20
"""Context of a model without such a key, as with ALiBi."""

SPREAD = 0.02
"""Standard deviation of the weights of a new head whose config.json gives none."""

LANGUAGE = ("causal-lm", "fill-mask")
"""Tasks of language models, whose head is never new."""

TOGETHER = "take config.json and model.safetensors from the same checkpoint"


@dataclass(frozen=True)
class AutoFamily:
    """Models of transformers' auto classes for some tasks."""

    family: str
    autos: Mapping[str, str]
    """Task -> auto class."""
    inputs: tuple[str, ...]
    """Inputs of the exported graph."""

    def describe(self, config: dict[str, Any], tensors: Tensors, head: Head = CAUSAL_LM) -> Architecture:
        """Architecture of a checkpoint with a task's head, whose tensors are checked against it."""
        settled = self.task_config(config, tensors, head)
        found = self._found(settled, head.task)
        new = tuple(_checked(found, tensors, head))
        layers = found.structure.layers
        tables = [layer for layer in layers if layer.kind == "embedding"]
        return Architecture(
            family=self.family,
            layers=layers,
            blocks=found.structure.blocks,
            sites=found.structure.sites,
            context=self.positions(settled),
            vocabulary=tables[0].out_features if tables else 1,
            parameters=found.structure.parameters,
            points=tuple(_points(found, layers)),
            embeddings=tables[0].name if tables else layers[0].name,
            new_head=new,
            floats=tuple(found.structure.floats.items()),
            covered=found.structure.covered,
            uncovered=found.structure.uncovered,
        )

    def task_config(self, config: dict[str, Any], tensors: Tensors, head: Head) -> dict[str, Any]:
        """config.json of the task's model: its class, labels and problem type. A language model keeps the
        checkpoint's.
        """
        self._check_task(config, head)
        if head.task == "causal-lm":
            return config
        config = {key: value for key, value in config.items() if key != KEY}
        if head.task == "fill-mask":
            return config | {"architectures": [self._found(config, head.task).title]}
        if isinstance(head, EmbeddingHead):
            pooled = {"pooling": head.pooling, "normalize": head.normalize}
            named = {**config, "problem_type": head.problem, KEY: pooled}
            return named | {"architectures": [self._found(named, head.task).title]}
        labels = labels_of(config, self._outputs(config, tensors, head), head)
        own = (config.get("architectures") or [""])[0]
        named = config_of(config, own, labels, head)
        return named | {"architectures": [self._found(named, head.task).title]}

    def cache_layout(self, config: dict[str, Any]) -> CacheLayout:
        """Layout of a key-value cache. Raises ModelError for a model whose keys and values differ in
        shape.
        """
        layout = self._found(config, "causal-lm").cache
        if layout is None:
            raise ModelError(
                f"a {config.get('model_type')} has no key-value cache with keys and values of one shape",
                fix="drop `export.cache`",
            )
        return layout

    def positions(self, config: dict[str, Any]) -> int:
        """Largest number of tokens in a sequence; RoBERTa and its like count positions from the padding."""
        text = config.get("text_config", config)
        most = next((text[key] for key in POSITIONS if type(text.get(key)) is int), UNLIMITED)
        if config.get("model_type") not in COUNTED_FROM_PADDING:
            return most
        padding = text.get("pad_token_id")
        return most - (1 if padding is None else padding) - 1

    def signature(self, config: dict[str, Any]) -> tuple[Input, ...]:
        """Inputs of the exported graph with their axes and types. Raises ModelError for images without a
        size.
        """
        if self.inputs != (PIXELS,):
            taken = self._found(config, self._task_of(config)).arguments
            return token_inputs(tuple(name for name in self.inputs if name in taken))
        vision = config.get("vision_config", config)
        size = vision.get("image_size", config.get("image_size"))
        if size is None:
            raise ModelError(
                "neither config.json nor the preprocessing gives the size of images",
                fix="write `size` with `mean` and `std` under `task`, or `image_size` into config.json",
            )
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return image_inputs(vision.get("num_channels", 3), height, width)

    def load_float(self, source: Path, directory: Path | None = None) -> PreTrainedModel:
        """Load the stock model in fp32, in evaluation mode, from safetensors in a local directory.

        `directory` is the load stage's folder: its config.json names the class, and its float.json the seed
        of a new head. Other missing tensors raise ModelError.
        """
        folder = directory or source
        values = read_config(folder)
        if PYTHON in values:
            return self._ready(filled_module(values, source, folder), values)
        config = stock_config(folder)
        named = self._class_of(config)
        model, loading_info = stock_model(named, source, folder, config, **FORMS)
        missing = [name for name in loading_info["missing_keys"] if not name.endswith(COUNTED)]
        if KEY in values:
            from qcompress.models.text_embedder import embedder

            prefix = f"{model.base_model_prefix}."
            missing = [prefix + name for name in missing if not name.startswith("pooler.")]
            model = embedder(model, values[KEY])
        model = with_logits(model, self._task_of(values), source)
        complete(model, source, folder, missing, getattr(config, "initializer_range", SPREAD))
        return self._ready(model, values)

    def empty(self, directory: Path) -> PreTrainedModel:
        """Stock model of a config.json with unset weights and set buffers, to be filled by the caller."""
        from qcompress.models.structure.reduced import meta_model, ties_of

        values = read_config(directory)
        with reading(directory / "config.json", "transformers cannot make a model from it"):
            model = meta_model(self.autos[self._task_of(values)], values).eval()
        model = with_logits(model, self._task_of(values), directory)
        model.ties = tuple(ties_of(model))
        return self._ready(model, values)

    def tie(self, model: nn.Module) -> None:
        """Share float tensors that were set after construction; quantized layers share by themselves."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for first, other in model.ties:
            if first in parameters and other in parameters:
                parent, _, child = other.rpartition(".")
                setattr(model.get_submodule(parent), child, parameters[first])

    def install_points(self, model: nn.Module, points: Mapping[str, nn.Module]) -> None:
        """Install quantization points by name; each module receives the activation to quantize."""
        put_points(model, points)

    def prefix(self, config: dict[str, Any]) -> str:
        """Prefix of the tensors of a task model's body, which its head lacks."""
        return self._found(config, self._task_of(config)).prefix

    def shorten(self, config: dict[str, Any], blocks: int) -> tuple[dict[str, Any], Names]:
        """Config of a model with the first blocks, and the function to its tensor names. A model whose blocks
        differ stays whole.
        """
        names = self._found(config, self._task_of(config)).structure.blocks
        count = min(blocks, len(names))
        short = {key: _shortened(key, value, len(names), count) for key, value in config.items()}
        if short == config:
            return config, lambda name: name
        gone = tuple(f"{name}." for name in names[count:])
        return short, lambda name: None if name.startswith(gone) else name

    def _ready(self, model: nn.Module, config: dict[str, Any]) -> nn.Module:
        """The model in evaluation mode, without a cache, deaf to inputs that it does not take."""
        taken = self._found(config, self._task_of(config)).arguments
        others = [name for name in self.inputs if name not in taken]
        if others:
            model.register_forward_pre_hook(_without(others), with_kwargs=True)
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        return model.eval()

    def _class_of(self, config: PreTrainedConfig) -> str:
        """Name of the class of a task model's config; a language model's may name another head."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        if "causal-lm" in self.autos:
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
        return config.architectures[0]

    def _task_of(self, config: dict[str, Any]) -> str:
        """Task of a task model's config.json."""
        if KEY in config:
            return "feature-extraction"
        named = (config.get("architectures") or [""])[0]
        ends = {task: auto.removeprefix("AutoModel") for task, auto in self.autos.items()}
        tasks = (task for task, end in ends.items() if end and named.endswith(end))
        return next(tasks, next(iter(self.autos)))

    def _found(self, config: dict[str, Any], task: str) -> Discovered:
        return structure_of(self.autos[task], config)

    def _check_task(self, config: dict[str, Any], head: Head) -> None:
        if head.task not in self.autos:
            tasks = ", ".join(self.autos)
            raise ModelError(
                f"a {self.family} cannot carry the task {head.task}", fix=f"choose one of {tasks}"
            )
        check_values(config)

    def _outputs(self, config: dict[str, Any], tensors: Tensors, head: Head) -> int | None:
        """Number of outputs of the checkpoint's own head; None without a head."""
        found = self._found(config, head.task)
        last = next((layer for layer in found.structure.layers if layer.kind == "head"), None)
        stored = tensors.get(f"{last.name}.weight") if last else None
        return stored and stored[1][0]


def _checked(found: Discovered, tensors: Tensors, head: Head) -> Iterator[str]:
    """Check the tensors of a checkpoint; yields the tensors of a classifier that it lacks. Raises ModelError
    for another shape, and for another missing tensor.
    """
    tensors = {found.name(name): value for name, value in tensors.items()}
    draws = head.task not in LANGUAGE
    shared: dict[str, list[str]] = {}
    for first, other in found.ties:
        shared.setdefault(first, []).append(other)
    for name, shape in found.tensors.items():
        known = [name, *shared.get(name, ())]
        known += [one.removeprefix(found.prefix) for one in known]
        stored = next((tensors[one][1] for one in known if one in tensors), None)
        if stored is None and draws and not name.startswith(found.prefix):
            yield name
        elif (stored is None and not found.converts) or (stored is not None and tuple(stored) != shape):
            raise ModelError(
                f"{name}: config.json asks for shape {list(shape)}, the checkpoint has "
                f"{'no such tensor' if stored is None else list(stored)}",
                fix=TOGETHER,
            )


def _points(found: Discovered, layers: tuple[Layer, ...]) -> Iterator[Point]:
    """Points of the attentions, as wide as their key and value heads or as the inputs of their last layer. An
    attention that is called more than once has none.
    """
    structure = found.structure
    for attention, (heads, width) in zip(structure.attentions, structure.key_values, strict=True):
        inside = [layer for layer in layers if layer.name.startswith(f"{attention}.")]
        if any(layer.calls > 1 for layer in inside):
            continue
        whole = inside[-1].in_features if inside else heads * width
        for operand in OPERANDS:
            features = heads * width if operand in ("key_point", "value_point") else whole
            yield Point(f"{attention}.{operand}", "attention", features)


def _shortened(key: str, value: Any, blocks: int, count: int) -> Any:
    """Value of config.json for a model with fewer blocks."""
    if isinstance(value, list) and len(value) == blocks:
        return value[:count]
    counts = type(value) is int and value == blocks and ("layer" in key or "block" in key)
    return count if counts else value


def _without(names: Iterable[str]) -> Callable[..., Any]:
    """Hook that drops arguments."""

    def hook(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {name: value for name, value in keywords.items() if name not in names}

    return hook
