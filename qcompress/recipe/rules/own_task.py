"""Rules of the task any, whose functions are the user's. No torch."""

from __future__ import annotations

from pathlib import Path

from qcompress.recipe.rules.data import needs_labels
from qcompress.recipe.rules.training import loss_phase
from qcompress.recipe.yaml_file import Document
from qcompress.schema.recipe import AnyTask, Recipe
from qcompress.system.user_code import problem_of


def judge_own_task(recipe: Recipe, document: Document, base: Path) -> None:
    """Report functions of the task any that do not exist, and a missing loss."""
    task = recipe.task
    if not isinstance(task, AnyTask) or not document.sound(("task",)):
        return
    for name in ("score", "error", "loss"):
        named = getattr(task, name)
        problem = problem_of(named, base) if named is not None else None
        if problem is not None:
            document.report(
                ("task", name), problem, "write FILE:FUNCTION, with the file relative to the recipe"
            )
    if recipe.export.graph is not None:
        document.report(("export", "graph"), "belongs to other tasks than any", "drop it")
    if not document.sound(("schedule",), ("objective",), ("train",)) or task.loss or not needs_labels(recipe):
        return
    phase = loss_phase(recipe)
    if phase is not None and recipe.export.graph is None:
        message = f"has no loss, and the phase {phase} trains with it"
        fix = "write `loss: FILE:FUNCTION`, or `method: distillation` with `attention: 0` under `objective`"
        document.report(("task", "loss"), message, fix)
