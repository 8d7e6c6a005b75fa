"""Hooks that record a model's inner activations for losses: hidden states, attention scores, attention
outputs.

`Watch` hooks one model. Hidden states and block outputs come from forward hooks; values inside an attention
come from its probe (`models/attention.py`), for which the model runs an attention function with probes. The
model's outputs change only while the `Signals` of another model replace its own.

Shapes: hidden states [batch, tokens, width]; scores and probabilities [batch, heads, tokens, tokens]; context
[batch, heads, tokens, width of a head].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from qcompress.models.architecture import Architecture, Attention
from qcompress.models.attention import open_attention

Mode = Literal["output", "context", "attention"]

CUT: dict[Mode, tuple[str, ...]] = {
    "output": ("query", "key", "value"),
    "context": ("query", "key", "value"),
    "attention": ("query", "key"),
}
"""Layers of an attention whose input is detached while the teacher's activation replaces theirs."""


@dataclass
class Signals:
    """Activations of one forward pass. Lists are in the order of the architecture's blocks and attentions."""

    logits: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    contexts: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)


class Watch:
    """Hooks on one model. `attentions`: also record inside its attentions, which disables the fused
    kernel.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, attentions: bool) -> None:
        self.model = model
        self.signals = Signals()
        self.teacher: Signals | None = None
        self.mode: Mode | None = None
        self._handles: list[Any] = []
        self._probed: list[nn.Module] = []
        self._implementation: str | None = None
        for name in (architecture.embeddings, *architecture.blocks):
            self._hook(name, lambda module, arguments, output: self._hidden(output))
        if attentions:
            self._implementation = open_attention(model)  # restored by `remove`
            for index, attention in enumerate(architecture.attentions):
                self._attention(index, attention)

    def __call__(self, **inputs: Tensor) -> Signals:
        """Run the model and return its activations; without a replacement the model's outputs are
        unchanged.
        """
        return self.collect(lambda: self.model(**inputs).logits)

    def collect(self, run: Callable[[], Tensor]) -> Signals:
        """Record activations while `run` runs the model and returns its logits."""
        self.signals = Signals()
        logits = run()
        signals, self.signals = self.signals, Signals()
        signals.logits = logits
        return signals

    def replace(self, mode: Mode | None, teacher: Signals | None) -> None:
        """From now on put the teacher's activations in place of the model's; None: replace nothing."""
        self.mode, self.teacher = mode, teacher

    def remove(self) -> None:
        """Remove all hooks and restore the attention implementation."""
        for handle in self._handles:
            handle.remove()
        for module in self._probed:
            del module.probe
        if self._implementation is not None:
            self.model.set_attn_implementation(self._implementation)
        self._handles, self._probed, self._implementation = [], [], None

    def _hook(self, name: str, hook: Callable[..., Any]) -> None:
        self._handles.append(self.model.get_submodule(name).register_forward_hook(hook))

    def _hidden(self, output: Any) -> None:
        self.signals.hidden.append(output[0] if isinstance(output, tuple) else output)

    def _attention(self, index: int, attention: Attention) -> None:
        module = self.model.get_submodule(attention.module)
        module.probe = _Probe(self, index)
        self._probed.append(module)
        for role in ("query", "key", "value"):
            layer = self.model.get_submodule(getattr(attention, role))
            self._handles.append(layer.register_forward_pre_hook(self._cut(role)))
        self._hook(attention.output, lambda module, arguments, output: self._output(index, output))
        self._hook(attention.norm, lambda module, arguments, output: self.signals.normed.append(output))

    def _cut(self, role: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.mode is None or role not in CUT[self.mode]:
                return None
            return (arguments[0].detach(), *arguments[1:])

        return hook

    def _output(self, index: int, output: Tensor) -> Tensor | None:
        self.signals.outputs.append(output)
        return self.teacher.outputs[index] if self.mode == "output" else None


class _Probe:
    """Callbacks of one attention module."""

    def __init__(self, watch: Watch, index: int) -> None:
        self.watch, self.index = watch, index

    def scores(self, scores: Tensor) -> None:
        """Record scores after the mask was added, before the softmax."""
        self.watch.signals.scores.append(scores)

    def probabilities(self, probabilities: Tensor) -> Tensor:
        """Record the attention map, before dropout and rounding; returns the teacher's in mode
        `attention`.
        """
        self.watch.signals.probabilities.append(probabilities)
        replaced = self.watch.mode == "attention"
        return self.watch.teacher.probabilities[self.index] if replaced else probabilities

    def context(self, context: Tensor) -> Tensor:
        """Record the context of each head, before the output layer; returns the teacher's in mode
        `context`.
        """
        self.watch.signals.contexts.append(context)
        replaced = self.watch.mode == "context"
        return self.watch.teacher.contexts[self.index] if replaced else context
