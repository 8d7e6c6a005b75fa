"""Block-wise training loop: each transformer block in turn learns to reproduce its float output (Quadapter).

The update is the one of `loop.py`, a resumed run is bit-identical, and no method is special-cased.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.layers import refresh
from qcompress.system.reporter import Bar
from qcompress.tasks.examples import inputs_of
from qcompress.training.batches import batch_rows, in_order, to_device
from qcompress.training.checkpoint import Position, moving
from qcompress.training.compiled import compiled
from qcompress.training.loop import (
    advance,
    groups_of,
    log_update,
    optimizer_of,
    refuse_nan,
    reseed,
    set_rates,
    taps_of,
)
from qcompress.training.methods.protocols import Moment, Phase
from qcompress.training.observer import real_tokens
from qcompress.training.recording import log_scales
from qcompress.training.state import Training


@dataclass(frozen=True)
class _Sequences:
    """Inputs of one block for all calibration data.

    hidden: [sequences, tokens, width], shorter sequences zero-padded on the right. real: mask of the tokens
    that are not padding, bool [sequences, tokens]; None: no padding. rest: the block's other arguments, equal
    for all sequences except for a padding mask.
    """

    hidden: Tensor
    real: Tensor | None
    rest: dict[str, object]

    def __len__(self) -> int:
        return len(self.hidden)

    def of(self, rows: slice | list[int]) -> tuple[Tensor, dict[str, object], Tensor | None]:
        """Select sequences, cut to the longest of them. Returns hidden states, other arguments, padding
        mask.
        """
        if self.real is None:
            return self.hidden[rows], self.rest, None
        real = self.real[rows]
        real = real[:, : int(real.sum(1).max())]  # padding is on the right
        lowest = torch.finfo(self.hidden.dtype).min
        mask = torch.zeros(real.shape, device=real.device, dtype=self.hidden.dtype)
        mask = mask.masked_fill(~real, lowest)[:, None, None]
        return self.hidden[rows][:, : real.shape[1]], {**self.rest, "attention_mask": mask}, real

    def through(self, block: nn.Module, size: int) -> Tensor:
        """Run a block on all sequences, `size` at a time; returns outputs [sequences, tokens, width]."""
        outputs = torch.zeros_like(self.hidden)
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            x, rest, _ = self.of(rows)
            outputs[rows, : x.shape[1]] = _output(block(x, **rest))
        return outputs


def _squares(outputs: Tensor, targets: Tensor, real: Tensor | None) -> Tensor:
    """Squared differences at real tokens; `targets` may be longer than the selected sequences."""
    squares = (outputs - targets[:, : outputs.shape[1]]).square()
    return squares if real is None else squares[real]


def run_block_phase(training: Training, phase: Phase, start: Position) -> None:
    """Train each block in order to reproduce its float output on float inputs (L2 loss), keeping its best
    state.
    """
    blocks, size = training.architecture.blocks, training.recipe.train.batch_size
    reference = training.reference()
    inputs = _block_inputs(training, reference, blocks[0])
    training.prepared.model.train(phase.dropout)
    total = len(blocks) * phase.steps
    if start.block == 0:
        log_scales(training, start.phase, 0)
    with training.reporter.bar(phase.name, total, done=start.block * phase.steps) as bar:
        for index, name in enumerate(blocks):
            with torch.no_grad():
                outputs = inputs.through(reference.get_submodule(name), size)
            if index >= start.block:
                before, after = _fit_block(training, phase, start.phase, index, inputs, outputs, bar)
                log_scales(training, start.phase, (index + 1) * phase.steps, f"{name}.", last=True)
                training.facts.append({"name": phase.name, "block": name, "before": before, "after": after})
                training.save(Position(start.phase, index + 1), None)
            inputs = replace(inputs, hidden=outputs)


def _fit_block(
    training: Training,
    phase: Phase,
    phase_index: int,
    index: int,
    inputs: _Sequences,
    outputs: Tensor,
    bar: Bar,
) -> tuple[float, float]:
    """Train one block and return its mean squared error before and after. Restores the state with the
    lowest error.
    """
    name = training.architecture.blocks[index]
    block = training.prepared.model.get_submodule(name)
    groups = groups_of(training, phase, scope=f"{name}.")
    names = {f"{name}.{inner}" for inner, _ in block.named_parameters(remove_duplicate=False)}
    recipe, size = training.recipe, training.recipe.train.batch_size
    if not groups:
        error = _error(block, inputs, outputs, size)
        return error, error
    optimizer = optimizer_of(training, groups)
    taps = taps_of(training.prepared, f"{name}.")
    run = compiled(block, recipe.train)
    before = best = training.processes.agree(_error(block, inputs, outputs, size))
    kept = _snapshot(training.prepared.model, names)
    for step in range(phase.steps):
        rows = training.processes.share(batch_rows(np.ones(len(inputs)), size, step, recipe.seed))
        done = index * phase.steps + step + 1

        def closure(step: int = step, rows: list[int] = rows) -> Tensor:
            reseed(training.processes, recipe.seed, phase_index, index, step)
            refresh(block.modules())
            x, rest, real = inputs.of(rows)
            return _squares(_output(run(x, **rest)), outputs[rows], real).mean()

        set_rates(training, optimizer, groups, step, phase.steps)
        moment = Moment(recipe.seed, phase_index, index, step)
        report = training.stepper.step(closure, optimizer, groups, taps, training.accelerator, moment)
        refuse_nan(report.loss, f"phase {phase.name}, block {name}, step {step + 1}")
        advance(training.prepared)
        if training.history.update_due(phase_index, done):
            log_update(training, phase_index, done, report, {}, optimizer, groups)
        if step + 1 < phase.steps:  # the caller logs the final scales, after the best state is restored
            log_scales(training, phase_index, done, f"{name}.")
        where = f"block {index + 1} of {len(training.architecture.blocks)}"
        bar.advance(f"{where}  error {before:.3g} -> {best:.3g}  loss {report.loss:.3g}")
        if (step + 1) % phase.evaluate_every == 0 or step + 1 == phase.steps:
            error = training.processes.agree(_error(block, inputs, outputs, size))
            if error < best:
                best, kept = error, _snapshot(training.prepared.model, names)
    model_tensors = training.prepared.model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in kept.items():
            model_tensors[key].copy_(value)
    return before, best


def _snapshot(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    tensors = moving(model, names)
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor.requires_grad}


@torch.no_grad()
def _error(block: nn.Module, inputs: _Sequences, outputs: Tensor, size: int) -> float:
    """Mean squared error of a block over all calibration data."""
    refresh(block.modules())
    total, count = 0.0, 0
    for start in range(0, len(inputs), size):
        rows = slice(start, start + size)
        x, rest, real = inputs.of(rows)
        squares = _squares(_output(block(x, **rest)), outputs[rows], real)
        total += squares.sum(dtype=torch.float64).item()
        count += squares.numel()
    return total / count


class _Reached(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    pass


@torch.no_grad()
def _block_inputs(training: Training, model: nn.Module, first: str) -> _Sequences:
    """Capture the inputs of the first block.

    Sequences of equal length without padding, such as a language model's, share one mask. Where lengths
    differ, every token attends to all real tokens (`Encoder`), and each batch gets a new mask.
    """
    hidden: list[Tensor] = []
    real: list[Tensor | None] = []
    rest: dict[str, object] = {}

    def catch(module: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
        hidden.append(arguments[0])
        names = list(inspect.signature(module.forward).parameters)[1 : len(arguments)]
        rest.update(dict(zip(names, arguments[1:], strict=True)) | keywords)
        mask = rest.get("attention_mask")
        if mask is not None:
            rest["attention_mask"] = mask[:1]  # all sequences share one causal mask
        raise _Reached

    handle = model.get_submodule(first).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in in_order(training.calibration_data, training.recipe.train.batch_size):
            batch = to_device(batch, training.accelerator.device)
            real.append(real_tokens(batch))
            try:
                model(**inputs_of(batch))
            except _Reached:
                continue
    finally:
        handle.remove()
    padded = any(mask is not None and not bool(mask.all()) for mask in real)
    if not padded and len({x.shape[1] for x in hidden}) == 1:
        return _Sequences(torch.cat(hidden), None, rest)
    longest = max(x.shape[1] for x in hidden)
    masks = [x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
             for x, mask in zip(hidden, real, strict=True)]  # fmt: skip
    return _Sequences(
        torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in hidden]),
        torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]),
        rest,
    )


def _output(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value[0] if isinstance(value, tuple) else value
