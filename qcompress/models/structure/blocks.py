"""Blocks of a model, the parts of their layers, and the blocks that are alike."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from torch import nn

from qcompress.models.architecture import Layer
from qcompress.models.structure.layers import block_of
from qcompress.models.structure.trace import Trace


class _Finder:
    """Walks the module tree down to the blocks."""

    def __init__(self, model: nn.Module, trace: Trace, layers: Sequence[Layer]) -> None:
        self.model, self.trace = model, trace
        self.layers = {layer.name for layer in layers}
        self.modules = dict(model.named_modules())
        self.blocks: set[str] = set()

    def visit(self, name: str, in_stage: bool) -> None:
        """Enter the blocks below a module. `in_stage`: a list with one module counts as well."""
        module = self.modules[name]
        repeated = self._repeated(name, in_stage) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if repeated and all(self._is_stage(child) for child in repeated):
            for child in repeated:
                self.visit(child, in_stage=True)
        else:
            self.blocks.update(repeated)
        for child in self._children(name):
            if child not in repeated:
                self.visit(child, in_stage)

    def _children(self, name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        children = (f"{prefix}{child}" for child, _ in self.modules[name].named_children())
        return [child for child in children if child in self.modules]

    def _is_composite(self, name: str) -> bool:
        """True for a called module with a layer inside."""
        return name in self.trace.calls and any(layer.startswith(f"{name}.") for layer in self.layers)

    def _repeated(self, name: str, in_stage: bool) -> list[str]:
        """Composite children of a list that have the same class as another one, or that are all it has."""
        children = self._children(name)
        composite = [child for child in children if self._is_composite(child)]
        counts = Counter(type(self.modules[child]) for child in composite)
        alone = in_stage or isinstance(self.modules[name], nn.ModuleList)
        if len(composite) == 1 and len(children) == 1:
            return composite if alone else []
        return [child for child in composite if counts[type(self.modules[child])] > 1]

    def _is_stage(self, name: str) -> bool:
        """True for a module with a list of composite children of one class that holds most of its layers, and
        whose result it passes on. A block may hold such a list as well, of convolutions with their norms,
        but adds its result to a residual.
        """
        for below, module in self.modules[name].named_modules():
            inner = f"{name}.{below}" if below else name
            if not isinstance(module, nn.ModuleList | nn.Sequential):
                continue
            children = self._children(inner)
            is_chain = bool(children) and self._repeated(inner, in_stage=True) == children
            if is_chain and len({type(self.modules[child]) for child in children}) == 1:
                is_added = any(
                    children[-1] in makers
                    for parent, makers in self.trace.added.items()
                    if f"{inner}.".startswith(f"{parent}.") and f"{parent}.".startswith(f"{name}.")
                )
                return not is_added and 2 * self._count(inner) > self._count(name)
        return False

    def _count(self, name: str) -> int:
        """Number of layers inside a module."""
        return sum(layer.startswith(f"{name}.") for layer in self.layers)


def find_blocks(model: nn.Module, trace: Trace, layers: Sequence[Layer]) -> tuple[str, ...]:
    """Blocks in the order of their first call: the modules that a list of the model repeats. Stages, which
    only run a list of blocks, are replaced by their blocks.
    """
    finder = _Finder(model, trace, layers)
    finder.visit("", in_stage=False)
    order = {name: place for place, name in enumerate(trace.calls)}
    return tuple(sorted(finder.blocks, key=order.__getitem__))


def with_parts(
    layers: Sequence[Layer], trace: Trace, blocks: Sequence[str], attentions: Sequence[str]
) -> tuple[Layer, ...]:
    """Layers with their `part`: "attention" below a module that calls the attention interface,
    softmax or scaled dot-product attention, "ffn" for other linear layers of a block.

    The module is the outermost one inside the block that is called and does not hold all linear layers of
    the block, so that an output projection beside the attention belongs to it.
    """
    linear = {layer.name for layer in layers if layer.kind == "linear"}
    inside = {block: {name for name in linear if name.startswith(f"{block}.")} for block in blocks}
    attending = set()
    for mixer in (*attentions, *trace.mixers):
        block = block_of(mixer, blocks)
        if block is None:
            continue
        parents = mixer.split(".")
        sizes = range(len(block.split(".")) + 1, len(parents) + 1)
        for parent in (".".join(parents[:size]) for size in sizes):
            held = {name for name in inside[block] if name.startswith(f"{parent}.")}
            if parent in trace.calls and held and held != inside[block]:
                attending |= held
                break
    return tuple(
        dataclasses.replace(layer, part="attention" if layer.name in attending else "ffn")
        if layer.name in linear and block_of(layer.name, blocks)
        else layer
        for layer in layers
    )


def representatives(model: nn.Module, layers: Sequence[Layer], blocks: Sequence[str]) -> dict[str, str]:
    """Block -> the first block with equal classes of modules and equal layers inside."""
    firsts: dict[tuple[object, ...], str] = {}
    return {block: firsts.setdefault(_signature(model, layers, block), block) for block in blocks}


def _signature(model: nn.Module, layers: Sequence[Layer], block: str) -> tuple[object, ...]:
    """Classes of a block's modules, shapes of its parameters, and its layers."""
    module = model.get_submodule(block)
    classes = tuple((name, type(child)) for name, child in module.named_modules())
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    inside = tuple(
        dataclasses.replace(layer, name=layer.name.removeprefix(block), tied_to=None, norm=None)
        for layer in layers
        if layer.name.startswith(f"{block}.")
    )
    return classes, shapes, inside
