"""Any artifact as one callable: inputs -> logits. A runner knows nothing of metrics.

inputs: `input_ids`, `attention_mask` and what else the task has, int64 [batch, sequence]; of images
`pixel_values`, fp32 [batch, channels, height, width].
logits: fp32 [batch, sequence, vocabulary] of a language model or a tagger, [batch, labels] of a classifier.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as native
from torch import nn

from qcompress.errors import ContractError, MachineError
from qcompress.models import FAMILIES
from qcompress.models.architecture import PAST
from qcompress.models.plan import rounded
from qcompress.models.prepare import assemble, rebuild, replace_module
from qcompress.quant.dynamic import DynamicActivation
from qcompress.schema.quantizers import Dynamic, Lsq, MinMax
from qcompress.system.artifacts import FloatModel, FoldedModel, TrainedModel, disabled_optimizers, read_json


class Runner(Protocol):
    """inputs -> outputs."""

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Logits for inputs."""


class TorchRunner:
    """A transformers model."""

    def __init__(self, model: nn.Module, family: str, device: torch.device) -> None:
        self.model, self.family, self.device = model.to(device), family, device

    @torch.inference_mode()
    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: tensor.to(self.device) for name, tensor in complete(self.family, inputs).items()}
        return self.model(**tensors).logits.float().cpu().numpy()


REWRITERS = ("WeightBiasQuantization",)
"""Optimizers of ONNX Runtime's basic level that compute something else than the graph says: this one rounds
the float bias of a convolution between Q/DQ nodes to int32, half a unit of the accumulator at most, and flips
roundings behind it. TensorRT keeps such a bias float."""


CPU = "CPUExecutionProvider"

ORT_ERRORS = (
    native.Fail, native.EPFail, native.EngineError, native.InvalidGraph, native.NotImplemented,
    native.RuntimeException, native.InvalidArgument, native.NotFound, native.DeviceReset, RuntimeError,
    ValueError, OSError,
)  # fmt: skip
"""What ONNX Runtime raises where a provider cannot take or run a graph; they have no base of their own."""


def open_session(
    file: Path, threads: int, optimized: bool, provider: str = CPU, options_of: dict[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """How every session of ours runs; `optimized` as `OnnxRunner` explains it. `options_of`: of the provider.

    A graph made elsewhere may run only without some optimizers; certificate.json beside it names them.
    Where a provider cannot start, ONNX Runtime goes on without it: that is a MachineError here.
    """
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_ENABLE_BASIC
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # its errors are raised; its log has names of nodes as they are
    # idle threads that spin take the processor from whoever shares the machine
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    without = {*disabled_optimizers(file), *(() if optimized else REWRITERS)}
    if provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        str(file),
        options,
        providers=[(provider, options_of or {})],
        disabled_optimizers=sorted(without) or None,
        # or a provider that fails, now or in a later run, is replaced by the CPU without a word
        **({} if provider == CPU else {"enable_fallback": 0}),
    )
    if provider not in session.get_providers():
        raise MachineError(
            f"ONNX Runtime's {provider} does not start on this machine",
            fix="install the libraries that this version of ONNX Runtime was built for",
        )
    return session


def usable_providers() -> tuple[str, ...]:
    """Providers that this ONNX Runtime was built with. CUDA's libraries are looked for in torch's and in the
    packages of NVIDIA, where pip leaves them.
    """
    with redirect_stdout(sys.stderr):  # it prints what it does not find
        onnxruntime.preload_dlls()
    return tuple(onnxruntime.get_available_providers())


def assigned_nodes(session: onnxruntime.InferenceSession) -> dict[str, int] | None:
    """How many nodes each provider took; None where this ONNX Runtime does not say."""
    if not hasattr(session, "get_provider_graph_assignment_info") or session.get_providers()[0] == CPU:
        return None
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def graph_inputs_of(file: Path) -> dict[str, list[int | str]]:
    """Axes of each input of a graph: names and sizes."""
    return {item.name: list(item.shape) for item in open_session(file, 1, optimized=False).get_inputs()}


ELEMENTS = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
    "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(bool)": np.bool_,
}  # fmt: skip
"""Types of the inputs of a graph that are fed."""


def fed(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs that the graph has, in its types: one made elsewhere may lack some, or take int32."""
    known = {item.name: ELEMENTS[item.type] for item in session.get_inputs() if item.name in inputs}
    return {name: inputs[name].astype(kind, copy=False) for name, kind in known.items()}


class OnnxRunner:
    """An ONNX file on ONNX Runtime, on its CPU provider unless another one is named.

    `optimized=False` stops at the basic level: it computes what the graph says. At the default level int4
    weights become MatMulNBits, which rounds the activations to int8, and int8 layers become integer matmuls.
    """

    def __init__(
        self, file: Path, family: str, threads: int, optimized: bool, provider: str = CPU,
        options_of: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.family = family
        self.session = open_session(file, threads, optimized, provider, options_of)

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        arrays = {name: tensor.numpy() for name, tensor in complete(self.family, inputs).items()}
        feed = fed(self.session, arrays)
        feed |= empty_past(self.session, len(next(iter(inputs.values()))))
        return self.session.run(["logits"], feed)[0].astype(np.float32)


def empty_past(session: onnxruntime.InferenceSession, rows: int) -> dict[str, np.ndarray]:
    """Keys and values of no tokens, as a graph with a key-value cache wants them: [rows, heads, 0, width]."""
    return {
        item.name: np.zeros((rows, item.shape[1], 0, item.shape[3]), ELEMENTS[item.type])
        for item in session.get_inputs()
        if item.name.startswith(PAST)
    }


def float_runner(model: FloatModel, device: torch.device) -> TorchRunner:
    """Stock transformers with nothing of ours in it."""
    family = read_json(model.path / "float.json")["family"]
    return TorchRunner(FAMILIES[family].load_float(model.source, model.path), family, device)


def trained_runner(model: FloatModel, trained: TrainedModel, device: torch.device) -> TorchRunner:
    """The trained model, rounding as it did in training."""
    prepared = rebuild(model, trained)
    return TorchRunner(prepared.model, prepared.family, device)


def made_static(trained: TrainedModel) -> tuple[str, ...]:
    """Layers and points whose activations had dynamic ranges until training had ended."""
    return tuple(read_json(trained.path / "trained.json").get("static_ranges", ()))


def dynamic_runner(
    model: FloatModel, trained: TrainedModel, options: MinMax | Lsq | Dynamic, device: torch.device
) -> TorchRunner:
    """The trained model with its dynamic activations put back, at layers and points: what training ended with
    before `observe.make_static`. `options` are those of the recipe's quantizer of activations.

    Weights are rounded as in `trained_runner`. A range is that of the whole tensor at hand, padding among it:
    logits of a sequence depend on what shares its batch.
    """
    if not isinstance(options, Dynamic):
        raise ContractError(
            f"{trained.path} was trained with dynamic activations, and the recipe says {options.name}",
            fix="measure it with the recipe that it was trained with",
        )
    prepared = rebuild(model, trained)
    layers = {item.name: item for item in prepared.plan}
    points = {item.name: item for item in rounded(prepared.points)}
    for name in made_static(trained):
        if name in points:
            item = points[name]
            quantizer = DynamicActivation(options, item.activations.bounds, item.point.features)
            replace_module(prepared.model, name, quantizer)
        else:
            item = layers[name]
            quantizer = DynamicActivation(options, item.activations.bounds, item.layer.in_features)
            prepared.layers[name].input_quantizer = quantizer
    return TorchRunner(prepared.model, prepared.family, device)


def folded_runner(folded: FoldedModel, device: torch.device, integer: bool = False) -> TorchRunner:
    """Integers and scales in torch, fp32 arithmetic; `integer`: int8 layers as exact integer sums."""
    family = read_json(folded.path / "folded.json")["family"]
    return TorchRunner(assemble(folded, integer=integer), family, device)


def complete(family: str, inputs: dict[str, np.ndarray], past: int = 0) -> dict[str, torch.Tensor]:
    """The inputs of the family's graph, as tensors; `past` tokens are in the key-value cache."""
    more = {"past": past} if past else {}
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return FAMILIES[family].graph_inputs(**tensors, **more)
