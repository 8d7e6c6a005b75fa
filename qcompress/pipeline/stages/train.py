"""Stage `train`: FloatModel, Recipe -> TrainedModel. The only stage with gradients.

Reads the checkpoint, the training and the calibration data. Writes trained.safetensors (the final scale of
every quantizer, every rescaling, and the tensors that training changed) and trained.json. After this stage
the model does not depend on the method that trained it. history.jsonl and distributions.json are for reports
only.
"""

from __future__ import annotations

import functools
import gc
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from qcompress.errors import ContractError, MachineError, ModelError
from qcompress.models import FAMILIES
from qcompress.models.architecture import Architecture, Site
from qcompress.models.checkpoint_files import read_config
from qcompress.models.plan import LayerPlan, PointPlan, plan_points, plan_sites, rounded
from qcompress.models.prepare import Prepared, initialise, open_points, quantize
from qcompress.quant.batchnorm import BATCH_NORMS, are_folded
from qcompress.quant.codebook import is_codebook
from qcompress.quant.ranges import Statistics
from qcompress.schema.custom import class_of
from qcompress.schema.formats import CodebookFormat
from qcompress.schema.recipe import Recipe
from qcompress.system.accelerate_state import separate_accelerator
from qcompress.system.artifacts import FloatModel
from qcompress.system.distributed import Processes
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS, loss_of
from qcompress.tasks.examples import Examples, apart
from qcompress.training.artifact import save_trained
from qcompress.training.blockwise import run_block_phase
from qcompress.training.calibration import Calibration, observe_all
from qcompress.training.checkpoint import Checkpoints, Position, moving
from qcompress.training.compiled import compiled, require_compiler
from qcompress.training.distributions import keep_channels, save_distributions
from qcompress.training.generators import restored_generators, seed_generators
from qcompress.training.history import History
from qcompress.training.loop import run_model_phase, settle
from qcompress.training.methods import ADAPTERS, OBJECTIVES, SCHEDULES, STEPPERS
from qcompress.training.methods.protocols import Adapter, FittedAdapter, Objective, Phase, Scene
from qcompress.training.movement import movement_note
from qcompress.training.observer import make_static
from qcompress.training.parameter_roles import ParameterRole, parameter_roles
from qcompress.training.recording import learned
from qcompress.training.state import Training

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
        require_compiler(recipe.train, accelerator.device)
        with restored_generators(accelerator.device):
            _train(_Job(float_model, recipe, base, architecture, plan, out, reporter, processes, accelerator))


@dataclass(frozen=True)
class _Job:
    """Arguments of the stage, and what follows from the recipe alone."""

    float_model: FloatModel
    recipe: Recipe
    base: Path
    architecture: Architecture
    plan: tuple[LayerPlan, ...]
    out: Path
    reporter: Reporter
    processes: Processes
    accelerator: Accelerator

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Phases of the recipe's schedule."""
        recipe = self.recipe
        schedule = SCHEDULES[recipe.schedule.name](recipe.schedule, recipe.train)
        return schedule.phases(self.architecture, self.plan)

    @functools.cached_property
    def points(self) -> tuple[PointPlan, ...]:
        """Quantization points of the recipe."""
        return plan_points(self.recipe, self.architecture)

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """Rescaling sites of the recipe."""
        return plan_sites(self.recipe, self.architecture, self.plan)

    @property
    def frozen(self) -> bool:
        """True if no phase trains a parameter of the float model."""
        return not {role for phase in self.phases for role in phase.roles} & {"weight", "other"}

    @property
    def updates(self) -> bool:
        """True if a phase makes updates."""
        return any(phase.steps for phase in self.phases)


def _train(job: _Job) -> None:
    adapter = class_of("adapter", job.recipe.adapter.name, ADAPTERS)(job.recipe.adapter)
    data = _read(job, fitted=isinstance(adapter, FittedAdapter))
    config = read_config(job.float_model.path)
    calibration = Calibration(job.recipe, config, data.calibration, job.accelerator.device)
    training, float_names = _set_up(job, data, calibration, adapter)
    prepared = training.prepared
    before = frozen_digest(prepared.model, training.roles) if job.frozen else None
    _run(training, job.phases)
    note = movement_note(prepared) if job.updates else None
    if note is not None:
        job.reporter.say(f"train: {note}")
    if job.frozen and frozen_digest(prepared.model, training.roles) != before:
        raise ContractError("a phase that trains only scales and adapters has changed a weight")
    ranges = make_static(prepared, calibration.batches())
    if job.processes.first:
        tensors = save_trained(training, adapter, float_names, job.frozen, before, ranges, job.out)
        save_distributions(prepared, tensors, job.out)
    job.processes.agree(None)  # the other processes return after everything is written


def _set_up(job: _Job, data: _Data, calibration: Calibration, adapter: Adapter) -> tuple[Training, set[str]]:
    """Prepare training: the model with its quantizers and adapter, and the names of the float model's
    tensors.
    """
    checkpoints = Checkpoints(job.out, job.recipe.train.checkpoint_every_s)
    if job.processes.first:
        checkpoints.drop_damaged(job.reporter.say)
    resuming = job.processes.agree(checkpoints.file.is_file())
    reference = _reference(job)
    if isinstance(adapter, FittedAdapter) and not resuming:
        _fit(job, adapter, reference, calibration)
    model = _load_float(job)
    float_names = set(model.state_dict())
    statistics = _observe(job, model, calibration) if data.calibration is not None and not resuming else {}
    prepared = quantize(model, job.architecture.family, job.plan, job.points)
    adapter.attach(prepared, job.sites, statistics)
    roles = parameter_roles(prepared, job.architecture.layers, float_names)
    _report_untrained(roles, job.phases, job.reporter)
    prepared.model.to(job.accelerator.device)
    if not resuming:
        _initialise(job, prepared, statistics)
    training = Training(
        recipe=job.recipe,
        architecture=job.architecture,
        prepared=prepared,
        objective=_objective(job),
        stepper=class_of("stepper", job.recipe.stepper.name, STEPPERS)(job.recipe.stepper),
        accelerator=job.accelerator,
        processes=job.processes,
        checkpoints=checkpoints,
        reporter=job.reporter,
        history=_history(job, prepared),
        train_data=data.train,
        calibration_data=data.calibration,
        reference=reference,
        moving=set(prepared.model.state_dict()) - (float_names if job.frozen else set()),
        roles=roles,
        facts=[],
        recent=[],
    )
    return training, float_names


def _fit(
    job: _Job, adapter: FittedAdapter, reference: Callable[[], nn.Module], calibration: Calibration
) -> None:
    """Let the adapter choose its scales on the float model."""
    job.reporter.say(f"train: {job.recipe.adapter.name}: {len(job.sites)} rescalings")
    adapter.fit(reference(), job.plan, job.sites, calibration.unpadded)
    gc.collect()  # the consumed model has reference cycles


def _load_float(job: _Job) -> nn.Module:
    """Load the float model that will be trained, on the training device."""
    family = FAMILIES[job.architecture.family]
    model = family.load_float(job.float_model.source, job.float_model.path).to(job.accelerator.device)
    if job.updates:
        _judge_norms(model, job.processes, job.reporter)
    return model


def _observe(job: _Job, model: nn.Module, calibration: Calibration) -> dict[str, Statistics]:
    """Statistics of the float model's activations, by layer or point."""
    open_points(model, job.architecture.family, job.points)
    return observe_all(model, job.plan, job.points, calibration, job.reporter)


def _initialise(job: _Job, prepared: Prepared, statistics: dict[str, Statistics]) -> None:
    """Set the initial scales and codebooks; the first process keeps the channel magnitudes for the report."""
    if job.sites and job.processes.first:
        keep_channels(job.sites, statistics, job.out)
    seed_generators(job.recipe.seed)  # k-means draws its initial centroids
    initialise(prepared, statistics, _later(job.plan, job.phases), job.recipe.train.optimizer)


def _objective(job: _Job) -> Objective:
    """The recipe's objective on the loss of its task."""
    recipe = job.recipe
    kind = class_of("objective", recipe.objective.name, OBJECTIVES)
    task = TASKS[recipe.task.name].settled(recipe.task, read_config(job.float_model.path))
    return kind(recipe.objective, loss_of(task, job.base))


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


def _history(job: _Job, prepared: Prepared) -> History:
    """Training log, which the first process writes."""
    blocks = len(job.architecture.blocks)
    updates = [(item.name, item.steps * (blocks if item.scope == "blocks" else 1)) for item in job.phases]
    scales = sum(1 for _ in learned(prepared))
    return History(job.out if job.processes.first else None, updates, scales, job.reporter)


def _judge_norms(model: nn.Module, processes: Processes, reporter: Reporter) -> None:
    """Refuse batch norms in several processes, where each would have statistics of its own share, and those
    that were folded into identities, which would normalize each batch; warn if their momentum is so high that
    folding uses the last batch's statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    if norms and processes.size > 1:
        raise MachineError(
            f"the model has {len(norms)} batch norms: each process would have statistics of its own share",
            fix="train it in one process",
        )
    if are_folded(norms):
        raise ModelError(
            f"all {len(norms)} batch norms of the checkpoint have mean 0 and a constant variance: they were "
            "folded into the convolutions, and training would normalize every batch anew",
            fix="take the checkpoint from before its batch norms were folded, or `method: ptq`",
        )
    fastest = max((norm.momentum or 0.0 for norm in norms), default=0.0)
    if fastest > 0.5:
        reporter.say(
            f"train: batch norms forget {100 * fastest:.3g} % of their statistics at each update (momentum "
            f"{fastest:g}), so that the last batch's are folded"
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


def _read(job: _Job, fitted: bool) -> _Data:
    """Read the data that the phases and a `fitted` adapter need; calibration falls back to training data."""
    recipe, path = job.recipe, job.float_model.path
    task, section = TASKS[recipe.task.name], recipe.data
    reader, options = task.reader(path), task.settled(recipe.task, read_config(path))

    def examples(name: str, source) -> Examples | None:
        part = None if source is None else task.examples(source, job.base, reader, options)
        for note in part.notes if part is not None else ():
            job.reporter.say(f"train: {name} data: {note}")
        return part

    trains = any(phase.scope == "model" and phase.steps for phase in job.phases)
    calibrates = any(item.weights and item.activations for item in job.plan) or bool(rounded(job.points))
    calibrates |= fitted or any(phase.scope == "blocks" and phase.steps for phase in job.phases)
    observed = examples("calibration", section.calibration or section.train) if calibrates else None
    data = _Data(
        train=examples("training", section.train) if trains else None,
        calibration=apart(observed) if observed is not None else None,
    )
    if (trains and data.train is None) or (calibrates and data.calibration is None):
        raise ContractError("the recipe was accepted without the data that its schedule needs")
    return data


def _reference(job: _Job) -> Callable[[], nn.Module]:
    """Loader of the stock float model, for schedules that need it."""
    float_model, device = job.float_model, job.accelerator.device

    def load() -> nn.Module:
        model = FAMILIES[job.architecture.family].load_float(float_model.source, float_model.path)
        return model.requires_grad_(False).to(device)

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
    training.objective.attach(compiled(wrapped, training.recipe.train), scene)
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
