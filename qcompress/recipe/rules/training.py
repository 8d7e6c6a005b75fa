"""Rules of the section `train` that need no model. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from qcompress.recipe.messages import choose
from qcompress.recipe.yaml_file import Document, Key
from qcompress.schema.axes import PHASES
from qcompress.schema.recipe import Recipe, Role

TASK_LOSS_PHASES = tuple(
    dict.fromkeys(name for phases in PHASES.values() for name in phases if name != "calibrate")
)
"""Phases that train with the task's loss on the training data; other phases use the calibration data."""


def loss_phase(recipe: Recipe) -> str | None:
    """The first phase that trains with the task's loss; None without one."""
    defaults = PHASES[recipe.schedule.name]
    steps = {name: recipe.train.phases.get(name, phase).steps for name, phase in defaults.items()}
    return next((name for name in defaults if name in TASK_LOSS_PHASES and steps[name]), None)


def judge_training(recipe: Recipe, document: Document) -> None:
    """Report options of `train` that do not fit the method."""
    _phases(recipe, document)
    _roles(recipe, document)
    _layer_drop(recipe, document)
    _compile(recipe, document)


def _phases(recipe: Recipe, document: Document) -> None:
    if not document.sound(("schedule",)):
        return
    schedule, train = recipe.schedule.name, recipe.train
    known = list(PHASES[schedule])
    if not known and (train.phases or train.lr):
        key: Key = ("train", "phases" if train.phases else "lr")
        if document.present(key):
            message = (
                f"sets {', '.join(train.phases or train.lr)}, and the schedule `{schedule}` trains nothing"
            )
            document.report(key, message, "drop it, or choose a method that trains")
        return
    for name in train.phases:
        if name not in known and document.present(("train", "phases")):
            message = f"the schedule `{schedule}` has no such phase, only {', '.join(known)}"
            document.report(("train", "phases", name), message, choose(name, known))


def _roles(recipe: Recipe, document: Document) -> None:
    phases = PHASES[recipe.schedule.name]
    if not phases or not document.sound(("schedule",)):
        return
    trained = sorted({role for phase in phases.values() for role in phase.roles})
    _rates(("train", "lr"), recipe.train.lr, trained, document)
    for name, options in recipe.train.phases.items():
        if name in phases:
            _rates(("train", "phases", name, "lr"), options.lr, phases[name].roles, document)


def _layer_drop(recipe: Recipe, document: Document) -> None:
    key: Key = ("train", "layer_drop")
    if recipe.train.layer_drop == 0 or not document.sound(key, ("schedule",), ("objective",), ("method",)):
        return
    if not any("weight" in phase.roles for phase in PHASES[recipe.schedule.name].values()):
        message = f"leaves out blocks while weights train, and `{recipe.schedule.name}` trains none"
        document.report(key, message, "drop it, or choose a method that trains weights")
    elif recipe.objective.name in ("distillation", "teacher-intervention"):
        message = f"leaves out blocks, and `objective: {recipe.objective.name}` compares each of them"
        document.report(key, message, "drop it, or train with `objective: task`")


def _compile(recipe: Recipe, document: Document) -> None:
    """Report methods whose updates cannot run compiled, or not with any gain."""
    key: Key = ("train", "compile")
    if not recipe.train.compile or not document.sound(
        key, ("train", "layer_drop"), ("schedule",), ("objective",), ("stepper",), ("method",)
    ):
        return
    schedule, objective, stepper = recipe.schedule.name, recipe.objective.name, recipe.stepper.name
    if not PHASES[schedule]:
        message = f"compiles the updates of training, and the schedule `{schedule}` makes none"
        document.report(key, message, "drop it, or choose a method that trains")
    elif objective in ("distillation", "teacher-intervention"):
        message = f"compiles the model as one graph, and `objective: {objective}` reads activations inside it"
        document.report(key, message, "drop it, or train with `objective: task`")
    elif stepper in ("saq", "squat"):
        message = f"compiles the model as one graph, and `stepper: {stepper}` reads gradients inside it"
        document.report(key, message, "drop it, or use `stepper: plain`")
    elif recipe.train.layer_drop:
        message = "compiles the model as one graph, and `layer_drop` makes another graph at each update"
        document.report(key, message, "drop it, or drop `layer_drop`")


def _rates(key: Key, rates: dict[Role, float], trained: Sequence[str], document: Document) -> None:
    for role in rates:
        if role not in trained and document.sound((*key, role)):
            fix = f"drop it; {', '.join(trained)} can have a learning rate here"
            document.report((*key, role), "nothing of this role is trained here", fix)
