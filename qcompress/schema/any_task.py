"""Section of the task `any`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, PrivateAttr

from qcompress.schema.text_tasks import TaskOptions

if TYPE_CHECKING:
    from qcompress.models.named_outputs import Output

ANY = "any"
"""Name of the task."""


def _named(value: str) -> str:
    file, _, function = value.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ValueError("write FILE:FUNCTION, such as metrics.py:iou")
    return value


Function = Annotated[str, AfterValidator(_named)]
"""FILE:FUNCTION, with the file relative to the recipe."""


class AnyTask(TaskOptions):
    """Any task of a model that `model.python` makes. Metrics: score, error (those that are given); without
    either, the agreement is the mean cosine of the outputs and the float model's.

    The functions are the user's code. `outputs` are the model's by name, `sample` the arrays of the data by
    name, without an axis for the batch.
    """

    sources: ClassVar[tuple[str, ...]] = ("npz",)
    """Keys of `data` that may name its examples."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Keys of `columns` that it reads, the input first."""
    ranked: ClassVar[bool] = False
    kind: ClassVar[str] = "regression"
    """Outputs are compared as numbers are, by squared differences."""

    name: Literal["any"] = "any"
    score: Function | None = None
    """`score(outputs, sample)` gives a number for one sample, of numpy arrays. The metric is the mean; higher
    is better.
    """
    error: Function | None = None
    """Like `score`, and lower is better."""
    loss: Function | None = None
    """`loss(outputs, batch)` gives a tensor [] to train on, of tensors with a first axis for the batch."""
    _outputs: tuple[Output, ...] = PrivateAttr(())
    _inputs: Mapping[str, tuple[tuple[int, ...], str]] = PrivateAttr({})
    """Outputs and inputs of the model, in a settled task."""

    @property
    def context(self) -> None:
        """None: samples have one size, and nothing is cut."""
        return None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics for which the recipe names a function."""
        return tuple(name for name in ("score", "error") if getattr(self, name) is not None)

    @property
    def main(self) -> tuple[str, ...]:
        """Metrics that the ladder shows."""
        return self.metrics

    def within(self, context: int) -> AnyTask:
        """The task unchanged: samples have no context."""
        return self

    def of(
        self, outputs: tuple[Output, ...], inputs: Mapping[str, tuple[tuple[int, ...], str]] = {}
    ) -> AnyTask:
        """The task of a model with these outputs, and inputs as shape and type of one sample by name."""
        copy = self.model_copy()
        copy._outputs, copy._inputs = outputs, inputs
        return copy

    @property
    def inputs(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Inputs of the model; empty before the task was settled."""
        return self._inputs

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Outputs of the model; empty before the task was settled."""
        return self._outputs
