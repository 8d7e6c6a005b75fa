"""Stage `train`: FloatModel, Recipe -> TrainedModel. The only stage with gradients.

Reads the checkpoint, the training and the calibration data. Writes trained.safetensors (the final scale of
every quantizer, every rescaling, and the tensors that training changed) and trained.json. After this stage
the model does not depend on the method that trained it. history.jsonl and distributions.json are for reports
only.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from qcompress.errors import ContractError, MachineError
from qcompress.models import FAMILIES
from qcompress.models.architecture import Architecture
from qcompress.models.checkpoint_files import read_config
from qcompress.models.plan import LayerPlan, PointPlan, plan_points, plan_sites, rounded
from qcompress.models.prepare import Prepared, initialise, open_points, quantize
from qcompress.quant.batchnorm import BATCH_NORMS
from qcompress.quant.codebook import is_codebook
from qcompress.schema.custom import class_of
from qcompress.schema.formats import CodebookFormat
from qcompress.schema.recipe import Recipe
from qcompress.system.accelerate_state import separate_accelerator
from qcompress.system.artifacts import FloatModel
from qcompress.system.distributed import Processes
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS
from qcompress.tasks.examples import Examples
from qcompress.training.artifact import save_trained
from qcompress.training.blockwise import run_block_phase
from qcompress.training.calibration import Calibration, observe_all
from qcompress.training.checkpoint import Checkpoints, Position, moving
from qcompress.training.distributions import keep_channels, save_distributions
from qcompress.training.generators import restored_generators, seed_generators
from qcompress.training.history import History
from qcompress.training.loop import Training, run_model_phase, settle
from qcompress.training.methods import ADAPTERS, OBJECTIVES, SCHEDULES, STEPPERS
from qcompress.training.methods.protocols import Adapter, FittedAdapter, Phase, Scene
from qcompress.training.movement import movement_note
from qcompress.training.observer import make_static
from qcompress.training.parameter_roles import ParameterRole, parameter_roles
from qcompress.training.recording import learned

ALONE = Processes()


@dataclass(frozen=True)
class _Data:
    train: Examples | None
    calibration: Examples | None


def train(
    float_model: FloatModel,
    recipe: Recipe,
    base: Path,
    architecture: Architecture,
    plan: tuple[LayerPlan, ...],
    out: Path,
    reporter: Reporter,
    processes: Processes = ALONE,
) -> None:
    """Train a model with the recipe's method, resuming from the checkpoint in `out` if there is one.

    With several `processes`, each calls this with equal arguments; the first one writes. Torch's generators
    and accelerate's settings are the caller's again afterwards.
    """
    with separate_accelerator(several=processes.size > 1):
        accelerator = _accelerator(recipe, processes)
        with restored_generators(accelerator.device):
            _train(float_model, recipe, base, architecture, plan, out, reporter, accelerator, processes)


def _train(
    float_model: FloatModel, recipe: Recipe, base: Path, architecture: Architecture,
    plan: tuple[LayerPlan, ...], out: Path, reporter: Reporter, accelerator: Accelerator,
    processes: Processes,
) -> None:  # fmt: skip
    phases = SCHEDULES[recipe.schedule.name](recipe.schedule, recipe.train).phases(architecture, plan)
    points = plan_points(recipe, architecture)
    adapter = class_of("adapter", recipe.adapter.name, ADAPTERS)(recipe.adapter)
    fitted = isinstance(adapter, FittedAdapter)
    data = _read(float_model, recipe, base, phases, plan, points, fitted)
    for name, part in (("training", data.train), ("calibration", data.calibration)):
        for note in part.notes if part is not None else ():
            reporter.say(f"train: {name} data: {note}")
    calibration = Calibration(recipe, read_config(float_model.path), data.calibration, accelerator.device)
    training, float_names, frozen = _set_up(
        float_model, recipe, architecture, plan, points, phases, data, calibration, adapter, out, reporter,
        accelerator, processes,
    )  # fmt: skip
    prepared = training.prepared
    before = frozen_digest(prepared.model, training.roles) if frozen else None
    _run(training, phases)
    note = movement_note(prepared) if any(phase.steps for phase in phases) else None
    if note is not None:
        reporter.say(f"train: {note}")
    if frozen and frozen_digest(prepared.model, training.roles) != before:
        raise ContractError("a phase that trains only scales and adapters has changed a weight")
    ranges = make_static(prepared, calibration.batches())
    if processes.first:
        tensors = save_trained(training, adapter, float_names, frozen, before, ranges, out)
        save_distributions(prepared, tensors, out)
    processes.agree(None)  # the other processes return after everything is written


def _set_up(
    float_model: FloatModel, recipe: Recipe, architecture: Architecture, plan: tuple[LayerPlan, ...],
    points: tuple[PointPlan, ...], phases: tuple[Phase, ...], data: _Data, calibration: Calibration,
    adapter: Adapter, out: Path, reporter: Reporter, accelerator: Accelerator, processes: Processes,
) -> tuple[Training, set[str], bool]:  # fmt: skip
    """Prepare training: the model with its quantizers and adapter, the names of the float model's tensors,
    and whether every weight stays frozen.
    """
    family, sites = FAMILIES[architecture.family], plan_sites(recipe, architecture, plan)
    checkpoints = Checkpoints(out, recipe.train.checkpoint_every_s)
    if processes.first:
        checkpoints.drop_damaged(reporter.say)
    resuming = processes.agree(checkpoints.file.is_file())
    reference = _reference(float_model, architecture, accelerator)
    if isinstance(adapter, FittedAdapter) and not resuming:
        reporter.say(f"train: {recipe.adapter.name}: {len(sites)} rescalings")
        adapter.fit(reference(), plan, sites, calibration.unpadded)
        gc.collect()  # the consumed model has reference cycles
    model = family.load_float(float_model.source, float_model.path).to(accelerator.device)
    float_names = set(model.state_dict())
    if any(phase.steps for phase in phases):
        _judge_norms(model, processes, reporter)

    statistics = {}
    if data.calibration is not None and not resuming:
        open_points(model, architecture.family, points)
        statistics = observe_all(model, plan, points, calibration, reporter)
    prepared = quantize(model, architecture.family, plan, points)
    adapter.attach(prepared, sites, statistics)
    roles = parameter_roles(prepared, architecture.layers, float_names)
    _report_untrained(roles, phases, reporter)
    if sites and not resuming and processes.first:
        keep_channels(sites, statistics, out)
    prepared.model.to(accelerator.device)
    if not resuming:
        seed_generators(recipe.seed)  # k-means draws its initial centroids
        initialise(prepared, statistics, _later(plan, phases), recipe.train.optimizer)

    trained = {role for phase in phases for role in phase.roles}
    frozen = not trained & {"weight", "other"}
    training = Training(
        recipe=recipe,
        architecture=architecture,
        prepared=prepared,
        objective=class_of("objective", recipe.objective.name, OBJECTIVES)(
            recipe.objective, TASKS[recipe.task.name].loss
        ),
        stepper=class_of("stepper", recipe.stepper.name, STEPPERS)(recipe.stepper),
        accelerator=accelerator,
        processes=processes,
        checkpoints=checkpoints,
        reporter=reporter,
        history=_history(out, phases, prepared, architecture, reporter, processes),
        train_data=data.train,
        calibration_data=data.calibration,
        reference=reference,
        moving=set(prepared.model.state_dict()) - (float_names if frozen else set()),
        roles=roles,
        facts=[],
        recent=[],
    )
    return training, float_names, frozen


def _report_untrained(
    roles: Mapping[str, ParameterRole], phases: tuple[Phase, ...], reporter: Reporter
) -> None:
    """Report declared parameters that keep their initial values, because no phase trains their role."""
    trained = {role for phase in phases if phase.steps for role in phase.roles}
    declared = {item.role for item in roles.values() if item.declared}
    for role in sorted(declared - trained) if trained else ():
        names = [name for name, item in roles.items() if item.declared and item.role == role]
        reporter.say(
            f"train: {len(names)} parameters with the role {role} ({names[0]}, ...) keep their starting "
            "values: no phase of the schedule trains this role"
        )


def _history(
    out: Path, phases: tuple[Phase, ...], prepared: Prepared, architecture: Architecture, reporter: Reporter,
    processes: Processes,
) -> History:  # fmt: skip
    """Training log, which the first process writes."""
    blocks = len(architecture.blocks)
    updates = [(phase.name, phase.steps * (blocks if phase.scope == "blocks" else 1)) for phase in phases]
    scales = sum(1 for _ in learned(prepared))
    return History(out if processes.first else None, updates, scales, reporter)


def _judge_norms(model: nn.Module, processes: Processes, reporter: Reporter) -> None:
    """Refuse batch norms in several processes, where each would have statistics of its own share; warn if
    their momentum is so high that folding uses the last batch's statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    if norms and processes.size > 1:
        raise MachineError(
            f"the model has {len(norms)} batch norms: each process would have statistics of its own share",
            fix="train it in one process",
        )
    fastest = max((norm.momentum or 0.0 for norm in norms), default=0.0)
    if fastest > 0.5:
        reporter.say(
            f"train: batch norms forget {100 * fastest:.0f} % of their statistics at each update, so that "
            "the last batch's are folded: `batch_norm_momentum` in config.json says so"
        )


def _later(plan: tuple[LayerPlan, ...], phases: tuple[Phase, ...]) -> set[str]:
    """Layers that k-means quantizes during training or at its end: those with a phase of their own, and all
    that Quant-Noise trains as floats.
    """
    named = {name for phase in phases for name in phase.quantizes}
    noisy = {item.name for item in plan if isinstance(item.weights, CodebookFormat) and item.noise and phases}
    return named | noisy


def _accelerator(recipe: Recipe, processes: Processes) -> Accelerator:
    if recipe.train.batch_size % processes.size:
        raise MachineError(
            f"train.batch_size is {recipe.train.batch_size}, which {processes.size} processes cannot share",
            fix="start fewer processes, or set train.batch_size to a multiple of their number",
        )
    wanted = recipe.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MachineError("train.device is cuda, and torch sees no CUDA device", fix="set train.device: cpu")
    cpu = wanted == "cpu" or not torch.cuda.is_available()
    if cpu and recipe.train.mixed_precision == "fp16":
        raise MachineError(
            "train.mixed_precision is fp16, and it needs a CUDA device",
            fix="set train.mixed_precision: bf16, or no",
        )
    return Accelerator(cpu=cpu, mixed_precision=recipe.train.mixed_precision)


def _read(
    float_model: FloatModel,
    recipe: Recipe,
    base: Path,
    phases: tuple[Phase, ...],
    plan: tuple[LayerPlan, ...],
    points: tuple[PointPlan, ...],
    fitted: bool,
) -> _Data:
    """Read the data that the phases and a `fitted` adapter need; calibration falls back to training data."""
    task = TASKS[recipe.task.name]
    reader = task.reader(float_model.path)
    options = task.settled(recipe.task, read_config(float_model.path))
    section = recipe.data

    def examples(data) -> Examples | None:
        return None if data is None else task.examples(data, base, reader, options)

    trains = any(phase.scope == "model" and phase.steps for phase in phases)
    calibrates = any(item.weights and item.activations for item in plan) or bool(rounded(points))
    calibrates |= fitted or any(phase.scope == "blocks" and phase.steps for phase in phases)
    data = _Data(
        train=examples(section.train) if trains else None,
        calibration=examples(section.calibration or section.train) if calibrates else None,
    )
    if (trains and data.train is None) or (calibrates and data.calibration is None):
        raise ContractError("the recipe was accepted without the data that its schedule needs")
    return data


def _reference(
    float_model: FloatModel, architecture: Architecture, accelerator: Accelerator
) -> Callable[[], nn.Module]:
    """Loader of the stock float model, for schedules that need it."""

    def load() -> nn.Module:
        model = FAMILIES[architecture.family].load_float(float_model.source, float_model.path)
        return model.requires_grad_(False).to(accelerator.device)

    return load


def frozen_digest(model: nn.Module, roles: Mapping[str, ParameterRole]) -> str:
    """Digest of every parameter of the float model, to prove that frozen phases did not change them."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not roles[name].declared:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _run(training: Training, phases: tuple[Phase, ...]) -> None:
    resumed = training.checkpoints.load(training.prepared.model)
    position, moments = Position(), {}
    if resumed is not None:
        position, moments = resumed.position, resumed.moments
        training.facts, training.recent = resumed.facts, resumed.recent
        training.stepper.load_state_dict(
            {name: tensor.to(training.accelerator.device) for name, tensor in resumed.stepper.items()}
        )
        training.reporter.say(
            f"train: resuming in phase {min(position.phase + 1, len(phases))} of {len(phases)}, "
            f"block {position.block}, step {position.step}"
        )
    block_steps = phases[position.phase].steps if position.phase < len(phases) else 0
    training.history.go_on(position.phase, position.block * block_steps + position.step)
    if resumed is None and phases:
        training.save(position, None)  # a run that is killed now need not calibrate again
    training.processes.agree(None)  # no process trains and writes a checkpoint before all have read it
    training.processes.equalise(moving(training.prepared.model, training.moving).values())
    scene = Scene(training.prepared.model, training.architecture, training.reference)
    # in evaluation mode accelerate adds autocast but no wrapper that averages gradients: steppers average
    # themselves, because the pass that computes a perturbation must not
    wrapped = training.accelerator.prepare_model(training.prepared.model, evaluation_mode=True)
    training.objective.attach(wrapped, scene)
    training.stepper.attach(wrapped)
    for index, phase in enumerate(phases):
        if index < position.phase or phase.steps == 0:
            continue
        start = position if index == position.phase else Position(phase=index)
        if phase.scope == "blocks":
            run_block_phase(training, phase, start)
        else:
            run_model_phase(training, phase, start, moments)
        moments = {}
        training.save(Position(phase=index + 1), None)
    books = [name for name, quantizer in training.prepared.weight_quantizers() if is_codebook(quantizer)]
    settle(training, books, len(phases))
    training.objective.detach()
    training.prepared.model.eval().requires_grad_(False)
