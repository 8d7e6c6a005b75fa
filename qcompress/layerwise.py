"""`verify --layers`: where trained, folded and ONNX part, layer by layer, and why.

Every window runs through the trained and the folded model in torch, and through the ONNX file in ONNX Runtime
at the basic level with the inputs of its matmuls as further outputs. For each layer: how far its inputs are
apart, and how many of their int8 codes differ.

Two correct programs round differently where a value lies on a tie between two codes, since their fp32 sums
differ in the last bits. Such a flip changes what follows, so later codes differ for no reason of their own.
A place counts as clean until a code differs there in an earlier layer (a causal model carries a flip to later
positions of its window, others to all of it). In clean places a difference must be a tie: one step, and
within `TIE` of the middle between two codes. What is left is unexplained, and a defect.

Writes layers.json: {"layers": [...], "first_difference", "first_unexplained", "unexplained", "windows"...}.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompress.artifacts import OnnxModel, read_json, write_json
from qcompress.certificate import Graph, matmul_inputs, with_outputs
from qcompress.distance import Distance
from qcompress.errors import UsageError
from qcompress.models import FAMILIES
from qcompress.plan import LayerPlan, plans_from_json, points_from_json, rounded
from qcompress.prepare import assemble, rebuild
from qcompress.progress import Reporter
from qcompress.quant.affine import to_codes
from qcompress.quant.folded import INT8
from qcompress.runners import complete, open_session
from qcompress.schema import Recipe
from qcompress.stages.verify import Artifacts, evaluation_samples
from qcompress.tasks import TASKS

TIE = {"fp32": 1e-3, "fp16": 0.25}
"""How far from the middle between two codes, in steps, a tie may lie: the noise of the compute type at code
127 after a block's sums."""

NOISE = {"fp32": 1e-4, "fp16": 1e-2}
"""Largest difference of a layer's input that rounding of the compute type explains, as a fraction of its
range; for layers without codes."""

Inputs = dict[str, np.ndarray]
"""Arrays by name: inputs of a model, or layer name -> its float input, fp32 [positions, features]."""


@dataclass
class _Layer:
    """What was found at one layer's input."""

    name: str
    scale: np.ndarray | None
    trained: Distance = field(default_factory=lambda: Distance(to="trained"))
    onnx: Distance = field(default_factory=lambda: Distance(to="folded"))
    codes: int = 0
    differ: int = 0
    clean: int = 0
    ties: int = 0
    farthest: float = 0.0

    def count(self, x: np.ndarray, found: np.ndarray, limit: float, clean: np.ndarray) -> np.ndarray:
        """Compare the codes of x with those found in the graph; returns the positions where some differ.

        x, found: [positions, features]; clean: bool [positions].
        """
        codes = to_codes(torch.from_numpy(x), torch.from_numpy(self.scale), INT8).numpy().astype(np.int16)
        apart = np.abs(codes - found)
        differ = apart > 0
        first = differ & clean[:, None]
        steps = x[first].astype(np.float64) / float(self.scale)
        off = np.abs(steps - np.floor(steps) - 0.5)
        self.codes += codes.size
        self.differ += int(differ.sum())
        self.clean += int(first.sum())
        self.ties += int(((off <= limit) & (apart[first] == 1)).sum())
        self.farthest = max(self.farthest, float(off.max(initial=0.0)))
        return differ.any(1)

    def to_json(self) -> dict[str, Any]:
        found = {
            "name": self.name,
            "folded_to_trained": self.trained.to_json() if self.trained.count else None,
            "onnx_to_folded": self.onnx.to_json(),
        }
        if self.scale is None:
            return {**found, "codes": None}
        names = ("codes", "differ", "clean", "ties", "farthest")
        return {**found, **{name: getattr(self, name) for name in names}, "unexplained": self.unexplained}

    @property
    def unexplained(self) -> int:
        return self.clean - self.ties

    def diverges(self, noise: float) -> bool:
        """Whether its input is another one than in the folded model."""
        if self.scale is not None:
            return self.differ > 0
        found = self.onnx.to_json()
        return not found["max_abs"] <= noise * found["range"]


def compare_layers(
    recipe: Recipe, base: Path, artifacts: Artifacts, out: Path, reporter: Reporter
) -> dict[str, Any]:
    """Compare the layers' inputs on the windows that verify compares; writes and returns layers.json.

    Raises UsageError where the folded model is gone or ONNX Runtime cannot compute the graph.
    """
    compute = recipe.format.compute
    if compute not in TIE:
        raise UsageError(f"--layers: ONNX Runtime's CPU provider does not compute {compute}")
    if artifacts.folded is None or artifacts.onnx is None:
        raise UsageError("--layers compares the ONNX file with the folded model, which is gone")
    family = FAMILIES[recipe.model.family]
    facts = read_json(artifacts.folded.path / "folded.json")
    if rounded(points_from_json(facts["points"])):
        raise UsageError(
            "--layers follows the inputs of layers, and this model rounds attention operands or residuals "
            "too, whose flips would look unexplained",
            fix="compare a run without format.attention and format.residual",
        )
    plan = plans_from_json(facts["plan"])
    samples = evaluation_samples(recipe, base, artifacts)
    windows = samples.sets[samples.first][: samples.compared]
    with _onnx_inputs(artifacts.onnx, plan, recipe.model.family) as (order, run_onnx):
        watched = [item for name in order for item in plan if item.name == name]
        folded = assemble(artifacts.folded)
        scales = {
            item.name: folded.get_submodule(item.name).input.scale.numpy()
            for item in watched
            if item.weights and item.activations
        }
        run_folded = _torch_inputs(folded, order, recipe.model.family)
        run_trained = None
        if artifacts.trained is not None and artifacts.float_model is not None:
            prepared = rebuild(artifacts.float_model, artifacts.trained)
            run_trained = _torch_inputs(prepared.model, order, recipe.model.family)
        layers = [_Layer(name, scales.get(name)) for name in order]
        with reporter.bar("compare layers", len(windows)) as bar:
            for window in windows:
                inputs = TASKS[recipe.task.name].collate([window])
                reference = run_folded(inputs)
                if run_trained is not None:
                    trained = run_trained(inputs)
                    for layer in layers:
                        layer.trained.add(trained[layer.name], reference[layer.name])
                _compare(layers, reference, *run_onnx(inputs), TIE[compute], family.CAUSAL)
                bar.advance(samples.first)
    return _write(layers, compute, len(windows), out)


def _compare(
    layers: list[_Layer], reference: Inputs, found: Inputs, codes: Inputs, limit: float, causal: bool
) -> None:
    """Take in one window."""
    clean = np.ones(len(next(iter(reference.values()))), bool)
    for layer in layers:
        x = reference[layer.name]
        layer.onnx.add(x, found[layer.name])
        if layer.scale is None:
            continue
        pooled = len(x) != len(clean)  # one vector for the whole sequence
        local = np.full(len(x), clean.all()) if pooled else clean
        differ = layer.count(x, codes[layer.name], limit, local)
        reached = np.logical_or.accumulate(differ) if causal and not pooled else differ.any()
        clean &= ~reached


def _write(layers: list[_Layer], compute: str, windows: int, out: Path) -> dict[str, Any]:
    noise = NOISE[compute]
    result = {
        "layers": [layer.to_json() for layer in layers],
        "first_difference": next((layer.name for layer in layers if layer.diverges(noise)), None),
        "first_unexplained": next((layer.name for layer in layers if layer.unexplained), None),
        "unexplained": sum(layer.unexplained for layer in layers),
        "windows": windows,
        "tie_limit": TIE[compute],
    }
    write_json(out / "layers.json", result)
    return result


def _torch_inputs(model: torch.nn.Module, names: list[str], family: str) -> Callable[[Inputs], Inputs]:
    """A function from the inputs of one sample to the input of each named layer."""
    seen: Inputs = {}

    def watch(name: str):
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[name] = _rows(arguments[0].float().numpy())

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
def _onnx_inputs(
    model: OnnxModel, plan: tuple[LayerPlan, ...], family: str
) -> Iterator[tuple[list[str], Callable[[Inputs], tuple[Inputs, Inputs]]]]:
    """The layers that the graph computes, in its order, and a function from the inputs of one sample to
    theirs and their codes.
    """
    values = matmul_inputs(Graph.read(model.file), plan)
    wanted = list(dict.fromkeys(name for pair in values.values() for name in pair if name))
    # beside the graph, because external data is looked for there
    with tempfile.NamedTemporaryFile(dir=model.file.parent, prefix=".layers-", suffix=".onnx") as file:
        file.write(with_outputs(model.file, wanted))
        file.flush()
        session = open_session(Path(file.name), torch.get_num_threads(), optimized=False)

        def run(inputs: Inputs) -> tuple[Inputs, Inputs]:
            feed = {name: tensor.numpy() for name, tensor in complete(family, inputs).items()}
            found = dict(zip(wanted, session.run(wanted, feed), strict=True))
            floats = {layer: _rows(found[name].astype(np.float32)) for layer, (name, _) in values.items()}
            codes = {
                layer: _rows(found[code]).astype(np.int16) for layer, (_, code) in values.items() if code
            }
            return floats, codes

        yield list(values), run


def _rows(x: np.ndarray) -> np.ndarray:
    """[..., features] as [positions, features]."""
    return x.reshape(-1, x.shape[-1])
