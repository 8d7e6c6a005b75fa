"""Any task of a user's module: arrays by name as data, and the user's own loss and metrics.

A sample is one row of every array of the data. Arrays with the name of an input of the model are its inputs;
the others are for the user's functions alone.

A result of one sample: `score` and `error` where the recipe names their functions; `cosine`, the mean over
the outputs of the cosine of an output and the float model's; and for the float model `outputs`, fp32 in
base64. Of an output with more than `MOST` values the cosine is that of `MOST` values, evenly spaced.

Torch is imported only where tensors are made.

Shapes: arrays [samples, ...]; logits [batch, values], all outputs side by side.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.errors import UsageError
from qcompress.models.architecture import Head
from qcompress.models.named_outputs import Output, apart, inputs_in, outputs_in
from qcompress.schema.any_task import ANY, AnyTask
from qcompress.schema.recipe import TextData
from qcompress.schema.tasks import AGREEMENT
from qcompress.system.user_code import function_of
from qcompress.tasks import padded
from qcompress.tasks.examples import LABELS, Batch, Examined, OfOneSize, rows
from qcompress.tasks.image_slices import archive_slices
from qcompress.tasks.images import array_header, opened_archive, read_array
from qcompress.tasks.table import Slices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["rows"]  # part of a task's interface

NAME = ANY

KNOWN = ()
"""Fields of a result that do not depend on the model."""

MOST = 4096
"""Largest number of values of an output that the agreement compares."""


@dataclass(frozen=True)
class ArraySample:
    """One row of the data: arrays by name, without an axis for the batch."""

    inputs: Mapping[str, np.ndarray]
    others: Mapping[str, np.ndarray]
    outputs: tuple[Output, ...]
    metrics: Mapping[str, Callable[..., float]]


@dataclass(frozen=True)
class ArrayExamples(OfOneSize):
    """Samples for training or calibration."""

    samples: Sequence[ArraySample]
    unit = "samples"

    def batch(self, rows: Sequence[int], moment: tuple[int, ...] | None = None) -> Batch:
        """Inputs of these rows, and the other arrays under `labels.<name>`."""
        import torch

        chosen = [self.samples[row] for row in rows]
        arrays = collate(chosen) | {
            f"{LABELS}.{name}": np.stack([sample.others[name] for sample in chosen])
            for name in chosen[0].others
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def reader(directory: Path) -> None:
    """None: nothing reads the samples but numpy."""


def processor(task: AnyTask) -> None:
    """None: nothing prepares the samples."""


def head(task: AnyTask) -> Head:
    """The module's own outputs, trained as the numbers of a regression are."""
    return Head(task.name, None, "regression")


def settled(task: AnyTask, config: dict[str, Any]) -> AnyTask:
    """Task of a model; `config` is its config.json."""
    return task.of(outputs_in(config), inputs_in(config))


def examples(data: TextData, base: Path, reader: None, task: AnyTask) -> ArrayExamples:
    """Samples for training or calibration; with a limit spread evenly over the data."""
    return ArrayExamples(padded.spread(_read(data, base, task, {}), data.limit))


def samples(data: TextData, base: Path, reader: None, task: AnyTask, limit: int | None) -> list[ArraySample]:
    """Evaluation samples in the order of the data, at most `limit` and `data.limit` of them."""
    metrics = {name: function_of(getattr(task, name), base) for name in task.metrics}
    return padded.first(_read(data, base, task, metrics), limit, data.limit)


def slices(data: TextData, base: Path, task: AnyTask) -> Slices:
    """Values of `data.slices` for each sample, in the order of the data."""
    return archive_slices(data, base)


def examine(data: TextData, base: Path, task: AnyTask, most: int | None) -> Examined:
    """Number of samples, from the headers of the archives; `most` is ignored. Labelled: they have metrics."""
    return Examined(sum(_count(base / name, task) for name in data.npz), bool(task.metrics))


def label_cells(data: TextData, base: Path, task: AnyTask, most: int | None) -> list[Any]:
    """Empty: an array has one reading."""
    return []


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Raise UsageError: the loss is the user's (`own_loss`)."""
    raise UsageError("the task any has a loss of its own", fix="write `loss: FILE:FUNCTION` under `task`")


def own_loss(task: AnyTask, base: Path) -> Callable[[Tensor, Batch], Tensor]:
    """Loss of a settled task: the user's function of the outputs and the arrays of a batch, by name."""
    if task.loss is None:
        return loss
    function = function_of(task.loss, base)

    def of(logits: Tensor, batch: Batch) -> Tensor:
        named = {name.removeprefix(f"{LABELS}."): tensor for name, tensor in batch.items()}
        return function(apart(logits.float(), task.outputs), named)

    return of


def logits_of(task: AnyTask, config: dict[str, Any]) -> tuple[int, int]:
    """One position, and the number of values of all outputs; `config` is the model's config.json."""
    return 1, sum(output.size for output in outputs_in(config))


def length(sample: ArraySample) -> int:
    """1, because samples have one size."""
    return 1


def collate(samples: Sequence[ArraySample]) -> dict[str, np.ndarray]:
    """Model inputs [batch, ...]."""
    return {name: np.stack([sample.inputs[name] for sample in samples]) for name in samples[0].inputs}


def compared(sample: ArraySample, logits: np.ndarray) -> np.ndarray:
    """Outputs of a sample for the comparison of rows, [1, values], each in units of its magnitude."""
    return (logits / _units(sample.outputs))[None]


def _units(outputs: Sequence[Output]) -> np.ndarray:
    """Magnitude of the output that each value belongs to, fp32 [values]."""
    return np.concatenate([np.full(output.size, output.scale, np.float32) for output in outputs])


def measure(batch: Sequence[ArraySample], logits: np.ndarray) -> list[dict[str, Any]]:
    """Results of the samples, for `joined`; logits [batch, values]."""
    return [_result(sample, row, sample.outputs) for sample, row in zip(batch, logits, strict=True)]


def results(
    known: Sequence[Mapping[str, Any]], logits: Sequence[np.ndarray], task: AnyTask
) -> list[dict[str, Any]]:
    """Results for `joined` from outputs [values] that were computed elsewhere. They have metrics where
    `known` has the samples.
    """
    return [_result(one.get("sample"), row, task.outputs) for one, row in zip(known, logits, strict=True)]


def known_of_samples(samples: Sequence[ArraySample]) -> list[dict[str, Any]]:
    """Fields from which `results` computes the metrics."""
    return [{"sample": sample} for sample in samples]


def _result(sample: ArraySample | None, row: np.ndarray, outputs: tuple[Output, ...]) -> dict[str, Any]:
    named = apart(row[None], outputs)
    result: dict[str, Any] = {"thinned": [_thinned(array) for array in named.values()]}
    if sample is None:
        return result
    mine, fields = {name: array[0] for name, array in named.items()}, {**sample.inputs, **sample.others}
    return {**{name: _number(name, one(mine, fields)) for name, one in sample.metrics.items()}, **result}


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(
            f"task.{name} returned {type(value).__name__} for a sample", fix="return one number"
        ) from None


def _thinned(array: np.ndarray) -> np.ndarray:
    """At most `MOST` values of an output [1, ...], evenly spaced."""
    values = array.reshape(-1)
    return values[np.linspace(0, len(values) - 1, min(len(values), MOST)).astype(np.int64)]


def joined(
    measured: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Results as they are kept; `reference`: the float model's, None for the float model, which is compared
    with itself.
    """
    return [
        _kept(result, None if reference is None else reference[place])
        for place, result in enumerate(measured)
    ]


def _kept(result: Mapping[str, Any], float_result: Mapping[str, Any] | None) -> dict[str, Any]:
    thinned, others = result["thinned"], {name: one for name, one in result.items() if name != "thinned"}
    if float_result is None:
        whole = np.concatenate([*thinned, np.zeros(0)]).astype("<f4")
        return {**others, "cosine": 1.0, "outputs": base64.b64encode(whole.tobytes()).decode("ascii")}
    flat = np.frombuffer(base64.b64decode(float_result["outputs"]), "<f4")
    known = np.split(flat, np.cumsum([len(one) for one in thinned])[:-1])
    cosines = [_cosine(one, other) for one, other in zip(thinned, known, strict=True)]
    return {**others, "cosine": None if None in cosines else math.fsum(cosines) / len(cosines)}


def _cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """Cosine of two vectors, of equal ones 1; None if a value is not finite."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else float(np.array_equal(a, b))


def kit(inputs: Mapping[str, np.ndarray], samples: Sequence[ArraySample]) -> dict[str, np.ndarray]:
    """Arrays of a probe kit: the graph's inputs as `input.<name>`, `length` [samples] of ones, and `units`
    [values], in which the outputs are compared.
    """
    named = {f"input.{name}": array for name, array in inputs.items()}
    return {"length": np.ones(len(samples), np.int32), "units": _units(samples[0].outputs), **named}


def notes(samples: Sequence[ArraySample]) -> list[str]:
    """Empty: samples are not modified."""
    return []


def metrics(
    results: Sequence[Mapping[str, Any]],
    task: AnyTask,
    reference: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Mean of each metric; without a metric, the mean cosine with the float model's outputs."""
    measured = [name for name in task.metrics if name in results[0]]
    if measured:
        return {name: _mean([result[name] for result in results]) for name in measured}
    return {} if reference is None else {AGREEMENT: _mean([result["cosine"] for result in results])}


def _mean(values: Sequence[float | None]) -> float:
    return math.nan if None in values else math.fsum(values) / len(values)


# Reading ------------------------------------------------------------------------------------------


def _count(file: Path, task: AnyTask) -> int:
    """Number of samples of an archive, from its headers. Raises UsageError for arrays of different numbers of
    samples, and for a missing or unfit input of the model.
    """
    with opened_archive(file) as archive:
        headers = {name: array_header(archive, name) for name in archive.files}
    shapes = {name: shape for name, (shape, _) in headers.items()}
    counts = {name: shape[0] if shape else None for name, shape in shapes.items()}
    if len(set(counts.values())) != 1 or None in counts.values() or not all(counts.values()):
        said = ", ".join(f"{name} {list(shapes[name])}" for name in list(shapes)[:4]) or "no array"
        raise UsageError(
            f"{file.name} holds {said}, and one row of every array is a sample",
            fix="write arrays whose first axis is the samples",
        )
    for name, (shape, element) in task.inputs.items():
        _demand(file.name, headers, name, shape, np.dtype(element))
    return next(iter(counts.values()))


def _read(
    data: TextData, base: Path, task: AnyTask, metrics: Mapping[str, Callable[..., float]]
) -> list[ArraySample]:
    """Samples of all archives."""
    read = []
    for name in data.npz or ():
        count = _count(base / name, task)
        with opened_archive(base / name) as archive:
            arrays = {array: read_array(archive, array) for array in archive.files}
        for row in range(count):
            one = {array: values[row] for array, values in arrays.items()}
            inputs = {
                array: np.asarray(one.pop(array), element) for array, (_, element) in task.inputs.items()
            }
            read.append(ArraySample(inputs, one, task.outputs, metrics))
    return read


def _demand(
    file: str,
    headers: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    name: str,
    shape: tuple[int, ...],
    element: np.dtype,
) -> None:
    """Raise UsageError unless an archive holds an input of the model's shape, of a type that becomes the
    model's without a loss of kind.
    """
    found = headers.get(name)
    wanted = f"the model's input {name} is {element} [samples{''.join(f', {size}' for size in shape)}]"
    if found is None:
        raise UsageError(
            f"{file} holds {', '.join(headers)}, and {wanted}", fix=f"write the array under the name {name}"
        )
    found_shape, kind = found
    if found_shape[1:] != shape or not np.can_cast(kind, element, "same_kind"):
        raise UsageError(
            f"{file}: {name} is {kind} {list(found_shape)}, and {wanted}",
            fix="write the samples as the model takes them, already prepared",
        )
