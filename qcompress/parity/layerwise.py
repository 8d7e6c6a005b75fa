"""Layer-by-layer comparison of the trained, folded and ONNX models: `verify --layers`, and `verify.held`.

A quantization point is the input of a layer, or an activation quantizer elsewhere (an operand of attention,
an input of a residual addition). Every window runs through the ONNX file in ONNX Runtime at the basic level,
with the values at all points as additional outputs, and through the folded model in torch.

Two correct programs round differently at a rounding tie, since their fp32 sums differ in the last bits, and
one such flip changes all later values. So the folded model runs with *forced codes*: each point compares its
own codes with the graph's, and passes on the graph's. Computation between two points therefore starts from
the graph's integers, no flip reaches a later point, and every code of the model is judged: one that differs
must be a tie, one step apart and within `TIE` of the middle between two codes. Any other difference is
unexplained: a defect at this very point.

Trained and folded models are compared without forcing: every bit must agree.

`verify --layers` writes layers.json: {"layers": [...], "first_difference", "first_unexplained",
"unexplained", "windows"...}. A run keeps the counts, and the distance between the logits of the graph and of
the model with forced codes (`held_codes`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.errors import ContractError, UsageError
from qcompress.graph.certificate.edges import padding, zero_point
from qcompress.graph.certificate.layers import matmul_inputs, with_outputs
from qcompress.graph.certificate.points import point_inputs
from qcompress.graph.view import read
from qcompress.models.folded import assemble
from qcompress.models.plan import calls_in, new_call, plans_from_json, points_from_json, rounded
from qcompress.models.prepare import replace_module
from qcompress.models.rebuild import rebuild
from qcompress.parity.distance import Distance
from qcompress.parity.forced_codes import NOISE, TIE, Held, Inputs, Place, Turn, summary
from qcompress.parity.inputs import Artifacts, evaluation_samples
from qcompress.parity.measure import Samples, batches
from qcompress.parity.runners import (
    compared_array,
    compared_outputs,
    complete,
    empty_past,
    fed,
    open_session,
)
from qcompress.quant.folded import Rounding
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import FoldedModel, OnnxModel, read_json, write_json
from qcompress.system.filesystem import writes_to
from qcompress.system.reporter import Reporter
from qcompress.tasks import TASKS


def compare_layers(
    recipe: Recipe, base: Path, artifacts: Artifacts, out: Path, reporter: Reporter
) -> dict[str, Any]:
    """Compare all quantization points on the windows that verify compares; writes and returns layers.json.

    Raises UsageError if the folded model is missing or ONNX Runtime cannot compute the graph.
    """
    compute = recipe.format.compute
    if compute not in TIE:
        raise UsageError(f"--layers: ONNX Runtime's CPU provider does not compute {compute}")
    if artifacts.folded is None or artifacts.onnx is None:
        raise UsageError("--layers compares the ONNX file with the folded model, which is gone")
    samples = evaluation_samples(recipe, base, artifacts)
    windows = samples.sets[samples.first][: samples.compared]
    with follow(artifacts.folded, artifacts.onnx, TIE[compute]) as (places, run_both):
        run_folded, run_trained = _as_they_run(artifacts, list(places), recipe.model.family)
        with reporter.bar("compare layers", len(windows)) as bar:
            for window in windows:
                inputs = TASKS[recipe.task.name].collate([window])
                order = run_both(inputs)
                if run_trained is not None:
                    reference, trained = run_folded(inputs), run_trained(inputs)
                    for name in places:
                        for call in calls_in(trained, name):
                            places[name].trained.add(trained[call], reference[call])
                bar.advance(samples.first)
    return _write([places[name] for name in order], compute, len(windows), out)


def held_codes(
    recipe: Recipe, folded: FoldedModel, onnx: OnnxModel, samples: Samples, reporter: Reporter
) -> dict[str, Any]:
    """Judge the folded model's codes against the graph's, for `verify.held`. Returns the fields of
    `forced_codes.summary`, "samples", and "distance": that of the graph's logits from those of the model with
    forced codes.
    """
    windows = samples.sets[samples.first][: min(recipe.verify.distance_samples, samples.compared)]
    task, distance = TASKS[recipe.task.name], Distance(to="folded", ranked=recipe.task.ranked)
    logit_pairs: list[tuple[np.ndarray, np.ndarray]] = []
    with (
        follow(folded, onnx, TIE[recipe.format.compute], logit_pairs) as (places, run_both),
        reporter.bar("verify codes", len(windows)) as bar,
    ):
        for rows in batches(task, windows, recipe.verify.batch_size):  # padded as in the onnx row
            batch = [windows[row] for row in rows]
            order = run_both(task.collate(batch))
            for window, *pair in zip(batch, *logit_pairs.pop(), strict=True):
                distance.add(*(task.compared(window, logits) for logits in pair))
                bar.advance(samples.first)
    points = [places[name] for name in order]
    return {"samples": len(windows), **summary(points), "distance": distance.to_json()}


@contextmanager
def follow(
    folded: FoldedModel,
    onnx: OnnxModel,
    limit: float,
    logit_pairs: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> Iterator[tuple[dict[str, Place], Callable[[Inputs], list[str]]]]:
    """Context manager that yields the comparisons by quantization point, and a function that runs one sample
    through the graph and through the model with forced codes, updates the comparisons, and returns the points
    in execution order.

    `limit` is the largest distance of a tie from the middle between two codes, in steps; `logit_pairs`
    collects the logits of the model with forced codes and of the graph. Raises ContractError for a point
    without a Q/DQ pair in the graph.
    """
    facts = read_json(folded.path / "folded.json")
    view = read(onnx.file, separated=True)
    plan, points = plans_from_json(facts["plan"]), points_from_json(facts.get("points", []))
    values = {name: (*pair, False) for name, pair in matmul_inputs(view, plan).items()}
    values |= point_inputs(view, points)
    wanted = [item.name for item in plan if item.weights and item.activations]
    wanted += [item.name for item in rounded(points)]
    if lost := [name for name in wanted if name not in values or values[name][1] is None]:
        raise ContractError(f"{onnx.file}: the graph has no Q/DQ pair in front of {', '.join(lost)}")
    known = {item.name for item in (*plan, *points)}
    places = {
        name: Place(name, limit, margins=padding(view, value, codes))
        for name, (value, codes, _) in values.items()
        if name in known
    }
    zeros = {name: zero_point(view, codes) for name, (_, codes, _) in values.items()}
    run_held = _held(assemble(folded), places, facts["family"])
    with _onnx_values(onnx, values, zeros, facts["family"]) as run_onnx:

        def run_both(inputs: Inputs) -> list[str]:
            floats, codes, graph_logits = run_onnx(inputs)
            order, forced_logits = run_held(inputs, floats, codes)
            if logit_pairs is not None:
                logit_pairs.append((forced_logits, graph_logits))
            return order

        yield places, run_both


def _write(places: list[Place], compute: str, windows: int, out: Path) -> dict[str, Any]:
    noise = NOISE[compute]
    result = {
        "layers": [place.to_json() for place in places],
        "first_difference": next((place.name for place in places if place.diverges(noise)), None),
        "first_unexplained": next((place.name for place in places if place.unexplained), None),
        "unexplained": sum(place.unexplained for place in places),
        "windows": windows,
        "tie_limit": TIE[compute],
    }
    write_json(out / "layers.json", result)
    return result


def _held(
    model: nn.Module, places: dict[str, Place], family: str
) -> Callable[[Inputs, Inputs, Inputs], tuple[list[str], np.ndarray]]:
    """Build a function that runs one sample with forced codes, given the graph's floats and codes; it returns
    the points in execution order, and the logits.
    """
    floats: Inputs = {}
    codes: Inputs = {}
    order: list[str] = []

    def watch(place: Place) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        turn = Turn(place.name)

        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            order.append(place.name)
            x = arguments[0].float()
            graph = place.padded(floats[turn.next(floats)], x.shape)
            place.onnx.add(_rows(x.numpy()), _rows(graph.reshape(x.shape)))

        return hook

    for name, place in places.items():
        module = model.get_submodule(name)
        rounding = module if isinstance(module, Rounding) else getattr(module, "input", None)
        if isinstance(rounding, Rounding):
            place.rounds = True
            held = Held(rounding, place, codes)
            replace_module(model, name if rounding is module else f"{name}.input", held)
            module = held if rounding is module else module
        module.register_forward_pre_hook(watch(place))

    @torch.inference_mode()
    def run(inputs: Inputs, graph_floats: Inputs, graph_codes: Inputs) -> tuple[list[str], np.ndarray]:
        for kept, new in ((floats, graph_floats), (codes, graph_codes)):
            kept.clear()
            kept.update(new)
        order.clear()
        logits = model(**complete(family, inputs)).logits
        return list(dict.fromkeys(order)), logits.float().numpy()

    return run


def _as_they_run(
    artifacts: Artifacts, names: list[str], family: str
) -> tuple[Callable[[Inputs], Inputs], Callable[[Inputs], Inputs]] | tuple[None, None]:
    """Functions from one sample's inputs to the input of each point, of the folded and of the trained model
    without forcing; None if the trained model is missing.
    """
    if artifacts.trained is None or artifacts.float_model is None:
        return None, None
    trained = rebuild(artifacts.float_model, artifacts.trained).model
    folded = assemble(artifacts.folded)
    return _torch_inputs(folded, names, family), _torch_inputs(trained, names, family)


def _torch_inputs(model: nn.Module, names: list[str], family: str) -> Callable[[Inputs], Inputs]:
    seen: Inputs = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[new_call(seen, name)] = _rows(arguments[0].float().numpy())

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(watch(name))

    @torch.inference_mode()
    def run(inputs: Inputs) -> Inputs:
        seen.clear()
        model(**complete(family, inputs))
        return dict(seen)

    return run


@contextmanager
def _onnx_values(
    model: OnnxModel, values: dict[str, tuple[str, str | None, bool]], zeros: dict[str, int], family: str
) -> Iterator[Callable[[Inputs], tuple[Inputs, Inputs, np.ndarray]]]:
    """Context manager that yields a function from one sample's inputs to the graph's floats and codes at each
    point, and its logits. `zeros`: the zero point of the codes at a point; 0 is subtracted elsewhere.
    """
    wanted = list(dict.fromkeys(name for tensors in values.values() for name in tensors[:2] if name))
    # in the graph's folder, where ONNX Runtime looks for external data
    with tempfile.NamedTemporaryFile(dir=model.file.parent, prefix=".layers-", suffix=".onnx") as file:
        with writes_to(Path(file.name)):
            file.write(with_outputs(model.file, wanted))
            file.flush()
        session = open_session(Path(file.name), torch.get_num_threads(), optimized=False)
        compared = compared_outputs(session, model.file.parent, family)

        def run(inputs: Inputs) -> tuple[Inputs, Inputs, np.ndarray]:
            feed = {name: tensor.numpy() for name, tensor in complete(family, inputs).items()}
            feed |= empty_past(session, len(next(iter(inputs.values()))))
            names = [*wanted, *compared]
            outputs = dict(zip(names, session.run(names, fed(session, feed)), strict=True))
            floats = {
                place: (outputs[name].swapaxes(-1, -2) if moved else outputs[name]).astype(np.float32)
                for place, (name, _, moved) in values.items()
            }
            codes = {
                place: outputs[code].astype(np.int16) - zeros[place]
                for place, (_, code, _) in values.items()
                if code
            }
            return floats, codes, compared_array([outputs[name] for name in compared], family)

        yield run


def _rows(x: np.ndarray) -> np.ndarray:
    """Reshape [..., features] to [positions, features]."""
    return x.reshape(-1, x.shape[-1])
