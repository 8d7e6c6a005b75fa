"""A small model of a config.json with the structure of the whole one: one block of each kind at its real
width, a small vocabulary, random weights. Discovery runs it in place of the checkpoint.

The whole model is built with parameters on the meta device. Its buffers are real, because no checkpoint holds
the frequencies of rotary embeddings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.models.loading import FORMS
from qcompress.models.pooling import KEY
from qcompress.models.python_source import PYTHON, module_of
from qcompress.models.text_embedder import embedder
from qcompress.quant.batchnorm import BATCH_NORMS
from qcompress.system.collector import paused

VOCABULARY = 512
"""Rows of the tables of a reduced language model."""

TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
"""Keys of config.json that name rows of a table."""

INDEX = re.compile(r"(^|_)(idx|id|index|number)$")
"""Names of attributes with a block's position."""


@dataclass(frozen=True)
class Reduced:
    """A reduced model, and where its blocks come from."""

    model: nn.Module
    whole: nn.Module
    """The model of the whole config.json; parameters on the meta device."""
    blocks: tuple[str, ...]
    """Blocks of the whole model, in the order of the forward pass."""
    sources: dict[str, str]
    """Block of the whole model -> the block of the reduced model that stands for it."""


def reduce(auto: str, values: dict[str, Any], all_blocks: bool = False) -> Reduced:
    """Build the reduced model of a config.json; `auto`: transformers' auto class; `all_blocks`: keep them."""
    whole = meta_model(auto, values)
    blocks = stacked_blocks(whole)
    if PYTHON in values:
        small = module_of(values)
        fill_random(small)
        return Reduced(small.eval(), whole.eval(), blocks, {block: block for block in blocks})
    small = meta_model(auto, _with_few_rows(values))
    sources = dict(zip(blocks, blocks, strict=True)) if all_blocks else _keep_one_of_each(small, blocks)
    fill_random(small)
    return Reduced(small.eval(), whole.eval(), blocks, sources)


def meta_model(auto: str, values: dict[str, Any]) -> nn.Module:
    """Model of the values of a config.json with parameters on the meta device and real buffers. Raises
    ModelError for values from which transformers' auto class makes no model.
    """
    if PYTHON in values:
        return _without_values(module_of(values))
    with paused():
        import transformers
        from accelerate import init_empty_weights

    try:
        config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
        config.architectures = config.architectures or []  # an auto class with two classes asks for them
        if getattr(config, "use_cache", None):
            config.use_cache = False
        with init_empty_weights(include_buffers=False):
            model = getattr(transformers, auto).from_config(config, **FORMS)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"config.json: transformers' {auto} makes no model of model_type {values.get('model_type')!r} "
            f"({error})",
            fix="name a checkpoint of this task, or update transformers",
        ) from None
    model.tie_weights()
    return embedder(model, values[KEY]) if KEY in values else model


def _without_values(model: nn.Module) -> nn.Module:
    """Move the parameters to the meta device, in place."""
    _replace(model, lambda name, parameter: parameter.to("meta"))
    return model


def _replace(model: nn.Module, value: Callable[[str, Tensor], Tensor]) -> None:
    """Replace the values of all parameters, by name in their module, in place; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(value(name, parameter), requires_grad=False)
            setattr(module, name, made[id(parameter)])


def ties_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of names of one parameter: the first name and another."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            yield owner, name


def stacked_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks: the children of the outermost lists whose children are modules of one class with
    layers inside. Lists of stages of several shapes count where no such list exists.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0
    ]
    alike = [(name, module) for name, module in lists if _is_stack(module)]
    return _outermost(alike) or _outermost(
        [(name, module) for name, module in lists if len(module) > 1 and not _holds_layers_itself(module)]
    )


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    one_class = len({type(child) for child in children}) == 1
    return one_class and not _holds_layers_itself(module) and bool(_weights(children[0]))


def _holds_layers_itself(module: nn.Module) -> bool:
    return any(isinstance(child, (nn.Linear, nn.Embedding, nn.Conv2d)) for child in module.children())


def _weights(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.dim() > 1]


def _outermost(lists: Iterable[tuple[str, nn.Module]]) -> tuple[str, ...]:
    blocks: list[str] = []
    for name, module in lists:
        if not any(name == block or name.startswith(f"{block}.") for block in blocks):
            blocks += [f"{name}.{child}" if name else child for child, _ in module.named_children()]
    return tuple(blocks)


def _with_few_rows(values: dict[str, Any]) -> dict[str, Any]:
    """The config with a small vocabulary, also in the config of its text part; token ids beyond it are
    unset.
    """
    few = dict(values)
    if type(few.get("vocab_size")) is int:
        few["vocab_size"] = min(few["vocab_size"], VOCABULARY)
        for key in TOKENS:
            if type(few.get(key)) is int and few[key] >= few["vocab_size"]:
                few[key] = None
    if isinstance(few.get("text_config"), dict):
        few["text_config"] = _with_few_rows(few["text_config"])
    return few


def _keep_one_of_each(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, str]:
    """Remove blocks with the class and the shapes of an earlier one, in place; returns for every block the
    block that is left in its place, under its new name.
    """
    kept: dict[str, dict[Any, str]] = {}
    sources: dict[str, str] = {}
    remaining: dict[str, list[nn.Module]] = {}
    for block in blocks:
        stack, _, _ = block.rpartition(".")
        module, seen = model.get_submodule(block), kept.setdefault(stack, {})
        kind = _kind(module)
        if kind not in seen:
            seen[kind] = f"{stack}.{len(seen)}"
            remaining.setdefault(stack, []).append(module)
        sources[block] = seen[kind]
    for stack, modules in remaining.items():
        listed = model.get_submodule(stack)
        if isinstance(listed, nn.ModuleList) and len(modules) < len(listed):
            parent, _, child = stack.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.ModuleList(modules))
        else:
            sources |= {block: block for block in blocks if block.rpartition(".")[0] == stack}
    return sources


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Two blocks with equal kinds are alike: classes, shapes and plain settings of all their modules."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    classes = tuple((name, type(module)) for name, module in block.named_modules())
    return shapes, classes, tuple(_settings(module) for module in block.modules())


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Plain attributes of a module that may change what it computes; not its index."""
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and not INDEX.search(name)
    )


def fill_random(model: nn.Module, seed: int = 0) -> None:
    """Give parameters on the meta device random values like those of a trained model: matrices of unit gain,
    norms near 1, biases and batch statistics off 0.
    """
    random = torch.Generator().manual_seed(seed)
    _replace(model, lambda name, parameter: _drawn(name, parameter, random))
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=random))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=random))


def _drawn(name: str, parameter: Tensor, random: torch.Generator) -> Tensor:
    noise = torch.rand(parameter.shape, generator=random).sub_(0.5).mul_(math.sqrt(12))  # of variance 1
    if parameter.dim() > 1:
        return noise.div_(math.sqrt(parameter[0].numel()))
    return noise.mul_(0.1).add_(1.0 if "weight" in name else 0.0)
