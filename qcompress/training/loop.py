"""Training loop over the whole model, and the functions it shares with the block-wise loop (`blockwise.py`).

Both loops make one update in one way (`Stepper.step`, then every quantizer's `advance`), resume from a
checkpoint bit for bit, and special-case no method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.models.prepare import Prepared
from qcompress.quant.codebook import is_codebook
from qcompress.quant.layers import QuantizedWeight, refresh
from qcompress.quant.learned_scale import unit_of
from qcompress.schema.rates import peak_rates, rate_factor
from qcompress.system.distributed import Processes
from qcompress.tasks.examples import Batch
from qcompress.training.batches import batch_rows, to_device
from qcompress.training.checkpoint import Position, moving, restore
from qcompress.training.generators import seed_generators
from qcompress.training.layerdrop import layer_drop
from qcompress.training.methods.protocols import Group, Moment, Phase, Report
from qcompress.training.recording import LossRecorder, log_scales
from qcompress.training.state import Training


def reseed(processes: Processes, *where: int) -> None:
    """Seed torch's generators from (seed, phase, block, step) and the process's rank."""
    where = (*where, processes.rank) if processes.rank else where
    seed_generators(_seed(*where))


def _seed(*where: int) -> int:
    return int(np.random.SeedSequence(where).generate_state(1, np.uint64)[0])


def groups_of(training: Training, phase: Phase, scope: str = "") -> list[Group]:
    """Parameter groups of the phase by role, restricted to names under `scope`; all other parameters stop
    requiring gradients.
    """
    chosen: dict[str, dict[str, nn.Parameter]] = {role: {} for role in phase.roles}
    for name, parameter in training.prepared.model.named_parameters():
        role = training.roles[name].role
        wanted = role in chosen and name.startswith(scope)
        parameter.requires_grad_(wanted)
        if wanted:
            chosen[role][name] = parameter
    train = training.recipe.train
    rates = peak_rates(train, phase.name)
    return [
        Group(
            role,
            tuple(members.values()),
            rates[role],
            train.weight_decay if role == "weight" else 0.0,
            kinds=tuple(training.roles[name].kind for name in members),
            units=tuple(unit_of(training.prepared.model, name) for name in members),
        )
        for role, members in chosen.items()
        if members
    ]


def optimizer_of(training: Training, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """Build the optimizer with one parameter group per role; learning rates are set before each update."""
    parameters = [
        {"params": list(group.parameters), "lr": group.lr, "weight_decay": group.weight_decay}
        for group in groups
    ]
    train = training.recipe.train
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=train.momentum, nesterov=train.momentum > 0)
    else:
        # on a CPU the fused kernel is about three times as fast as the loop over tensors
        optimizer = torch.optim.AdamW(parameters, fused=training.accelerator.device.type == "cpu" or None)
    return training.accelerator.prepare(optimizer)


def set_rates(training: Training, optimizer, groups: Sequence[Group], step: int, steps: int) -> None:
    """Set the learning rate of each group for update `step`."""
    factor = rate_factor(training.recipe.train, step, steps)
    for group, target in zip(groups, optimizer.param_groups, strict=True):
        target["lr"] = group.lr * factor


def advance(prepared: Prepared) -> None:
    """Project every quantizer and rescaling back into its valid range after an update, and clear every
    layer's cached rounded weight.
    """
    for layer in prepared.layers.values():
        if isinstance(layer, QuantizedWeight):
            layer.forget()
    for _, quantizer in [*prepared.weight_quantizers(), *prepared.activation_quantizers()]:
        quantizer.advance()
    for scale in prepared.rescalings.values():
        scale.advance()


def log_update(
    training: Training, number: int, step: int, report: Report, terms: Mapping[str, float], optimizer,
    groups: Sequence[Group],
) -> None:  # fmt: skip
    """Record update `step` (from 1) of phase `number` in the training log."""
    rates = {group.role: target["lr"] for group, target in zip(groups, optimizer.param_groups, strict=True)}
    training.history.update(number, step, report.passes, report.loss, terms, rates)


def taps_of(prepared: Prepared, scope: str = "") -> list[QuantizedWeight]:
    """Quantized weights under `scope`, for steppers that perturb them; a tied head uses its embedding
    table's.
    """
    return [prepared.layers[name] for name, _ in prepared.weight_quantizers() if name.startswith(scope)]


def run_model_phase(training: Training, phase: Phase, start: Position, moments: dict[str, Tensor]) -> None:
    """Run the updates of a phase that trains the whole model on batches of the training data."""
    if start.step == 0:
        settle(training, phase.quantizes, start.phase)
    for layer in training.prepared.layers.values():
        layer.noisy = phase.noise
    for _, quantizer in training.prepared.weight_quantizers():
        if is_codebook(quantizer):
            quantizer.waiting = not phase.noise
    groups = groups_of(training, phase)
    optimizer = optimizer_of(training, groups)
    restore(optimizer, moments)
    training.objective.begin(phase.name)
    recipe, data, model = training.recipe, training.train_data, training.prepared.model
    model.train(phase.dropout)
    taps, position = taps_of(training.prepared), start
    if start.step == 0:
        log_scales(training, start.phase, 0)
    began, read = time.monotonic(), 0
    drops = recipe.train.layer_drop if phase.dropout and "weight" in phase.roles else 0.0
    with (
        training.reporter.bar(phase.name, phase.steps, done=start.step) as bar,
        layer_drop(model, training.architecture, drops) as draw,
    ):
        for step in range(start.step, phase.steps):
            batch, size = _batch_of(training, start.phase, step)
            read += size

            due = training.history.update_due(start.phase, step + 1)
            recorder = LossRecorder(training.objective) if due else None

            def closure(
                step: int = step, batch: Batch = batch, recorder: LossRecorder | None = recorder
            ) -> Tensor:
                reseed(training.processes, recipe.seed, start.phase, 0, step)
                refresh(training.prepared.layers.values())
                draw(recipe.seed, start.phase, step)
                loss = training.objective.loss(batch, step / phase.steps)
                return recorder.record(loss) if recorder else loss

            set_rates(training, optimizer, groups, step, phase.steps)
            moment = Moment(recipe.seed, start.phase, 0, step)
            report = training.stepper.step(closure, optimizer, groups, taps, training.accelerator, moment)
            refuse_nan(report.loss, f"phase {phase.name}, step {step + 1}")
            advance(training.prepared)
            training.recent = [*training.recent, report.loss][-10:]
            position = replace(position, step=step + 1, passes=position.passes + report.passes)
            if recorder:
                terms = recorder.terms_of(report.loss)
                log_update(training, start.phase, step + 1, report, terms, optimizer, groups)
            log_scales(training, start.phase, step + 1)
            if training.processes.first and training.checkpoints.due():
                training.save(position, optimizer)
            speed = read / (time.monotonic() - began)
            bar.advance(f"loss {report.loss:.4f}  {speed:.0f} {data.unit}/s")
    last = sum(training.recent) / len(training.recent) if training.recent else None
    training.facts.append(
        {"name": phase.name, "steps": phase.steps, "passes": position.passes, "last_loss": last}
    )
    training.recent = []


def _batch_of(training: Training, number: int, step: int) -> tuple[Batch, int]:
    """This process's share of an update's batch, and its number of tokens or images."""
    data, recipe = training.train_data, training.recipe
    rows = batch_rows(data.lengths, recipe.train.batch_size, step, recipe.seed)
    rows = training.processes.share(rows)
    batch = to_device(data.batch(rows, (recipe.seed, number, step)), training.accelerator.device)
    return batch, int(data.lengths[rows].sum())


def settle(training: Training, names: Iterable[str], phase: int) -> None:
    """Run k-means for those of the named layers that have no codebook yet. Deterministic: every process, and
    a phase that is started again, gets the same codebooks.
    """
    prepared = training.prepared
    names = [name for name in names if not prepared.layers[name].weight_quantizer.settled]
    if not names:
        return
    seed_generators(_seed(training.recipe.seed, phase))
    with training.reporter.bar("k-means", len(names)) as bar:
        for name in names:
            layer = prepared.layers[name]
            clusters = layer.weight_quantizer.settle(layer.coded_weight().detach())
            layer.forget()
            empty = f", {clusters.empty} centroids unused" if clusters.empty else ""
            bar.advance(f"{name}: squared error {clusters.objective:.3g} a vector{empty}")
    training.processes.equalise(moving(prepared.model, training.moving).values())


def refuse_nan(loss: float, where: str) -> None:
    """Raise ModelError if the loss is not finite."""
    if not math.isfinite(loss):
        raise ModelError(f"the loss is {loss} at {where}", fix="lower the learning rates under train.lr")
