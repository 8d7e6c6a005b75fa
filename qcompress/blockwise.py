"""The training loop over one transformer block after another, each against its float output (Quadapter).

It makes the same update as `loop.py`, resumes bit for bit, and does not know which method it serves.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.checkpoint import Position, moving
from qcompress.loop import (
    Training,
    advance,
    batch_rows,
    groups_of,
    in_order,
    optimizer_of,
    refuse_nan,
    reseed,
    set_rates,
    taps_of,
    to_device,
)
from qcompress.methods.protocols import Moment, Phase
from qcompress.progress import Bar
from qcompress.tasks.examples import inputs_of


def run_block_phase(training: Training, phase: Phase, start: Position) -> None:
    """Each block in order learns to reproduce its float output on float inputs (L2), keeping its best
    state.
    """
    blocks = training.architecture.blocks
    reference = training.reference()
    inputs, rest = _block_inputs(training, reference, blocks[0])
    training.prepared.model.train(phase.dropout)
    total = len(blocks) * phase.steps
    with training.reporter.bar(phase.name, total, done=start.block * phase.steps) as bar:
        for index, name in enumerate(blocks):
            teacher = reference.get_submodule(name)
            with torch.no_grad():
                outputs = [_output(teacher(x, **rest)) for x in inputs]
            if index >= start.block:
                before, after = _fit_block(training, phase, start.phase, index, inputs, outputs, rest, bar)
                training.facts.append({"name": phase.name, "block": name, "before": before, "after": after})
                training.save(Position(start.phase, index + 1), None)
            inputs = outputs


def _fit_block(
    training: Training,
    phase: Phase,
    phase_index: int,
    index: int,
    inputs: list[Tensor],
    outputs: list[Tensor],
    rest: dict[str, object],
    bar: Bar,
) -> tuple[float, float]:
    """Train one block; returns its mean squared error before and after. A state that is worse is not kept."""
    name = training.architecture.blocks[index]
    block = training.prepared.model.get_submodule(name)
    groups = groups_of(training, phase, scope=f"{name}.")
    names = {f"{name}.{inner}" for inner, _ in block.named_parameters(remove_duplicate=False)}
    if not groups:
        error = _error(block, inputs, outputs, rest)
        return error, error
    optimizer = optimizer_of(training, groups)
    taps, recipe, size = (
        taps_of(training.prepared, f"{name}."),
        training.recipe,
        training.recipe.train.batch_size,
    )
    everything_in, everything_out = torch.cat(inputs), torch.cat(outputs)
    before = best = training.processes.agree(_error(block, inputs, outputs, rest))
    kept = _snapshot(training.prepared.model, names)
    for step in range(phase.steps):
        rows = training.processes.share(batch_rows(np.ones(len(everything_in)), size, step, recipe.seed))

        def closure(step: int = step, rows: list[int] = rows) -> Tensor:
            reseed(training.processes, recipe.seed, phase_index, index, step)
            return (_output(block(everything_in[rows], **rest)) - everything_out[rows]).square().mean()

        set_rates(training, optimizer, groups, step, phase.steps)
        moment = Moment(recipe.seed, phase_index, index, step)
        report = training.stepper.step(closure, optimizer, groups, taps, training.accelerator, moment)
        refuse_nan(report.loss, f"phase {phase.name}, block {name}, step {step + 1}")
        advance(training.prepared)
        where = f"block {index + 1} of {len(training.architecture.blocks)}"
        bar.advance(f"{where}  error {before:.3g} -> {best:.3g}  loss {report.loss:.3g}")
        if (step + 1) % phase.evaluate_every == 0 or step + 1 == phase.steps:
            error = training.processes.agree(_error(block, inputs, outputs, rest))
            if error < best:
                best, kept = error, _snapshot(training.prepared.model, names)
    own = training.prepared.model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in kept.items():
            own[key].copy_(value)
    return before, best


def _snapshot(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    found = moving(model, names)
    return {name: tensor.detach().clone() for name, tensor in found.items() if tensor.requires_grad}


@torch.no_grad()
def _error(block: nn.Module, inputs: list[Tensor], outputs: list[Tensor], rest: dict[str, object]) -> float:
    """Mean squared error over all calibration data."""
    pairs = zip(inputs, outputs, strict=True)
    total = sum((_output(block(x, **rest)) - y).square().sum(dtype=torch.float64).item() for x, y in pairs)
    return total / sum(y.numel() for y in outputs)


class _Reached(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    pass


@torch.no_grad()
def _block_inputs(training: Training, model: nn.Module, first: str) -> tuple[list[Tensor], dict[str, object]]:
    """What the first block receives: hidden states per batch, and the other arguments, equal for all batches.

    Calibration sequences have one length and no padding, so masks and positions do not differ.
    """
    hidden: list[Tensor] = []
    rest: dict[str, object] = {}

    def catch(module: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
        hidden.append(arguments[0])
        names = list(inspect.signature(module.forward).parameters)[1 : len(arguments)]
        rest.update(dict(zip(names, arguments[1:], strict=True)) | keywords)
        mask = rest.get("attention_mask")
        if mask is not None:
            rest["attention_mask"] = mask[:1]  # the causal mask is the same for every sequence
        raise _Reached

    handle = model.get_submodule(first).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in in_order(training.calibration_data, training.recipe.train.batch_size):
            try:
                model(**inputs_of(to_device(batch, training.accelerator.device)))
            except _Reached:
                continue
    finally:
        handle.remove()
    return hidden, rest


def _output(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value[0] if isinstance(value, tuple) else value
