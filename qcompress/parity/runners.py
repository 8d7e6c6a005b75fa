"""Runners: any artifact as a function from inputs to logits, without metrics.

inputs: `input_ids`, `attention_mask` and the task's other inputs, int64 [batch, sequence]; for images
`pixel_values`, fp32 [batch, channels, height, width]. logits: fp32 [batch, sequence, vocabulary] of a
language model or a tagger, [batch, labels] of a classifier.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnxruntime
import torch
from torch import nn

from qcompress.engine.probe_kit.engine_runners import EXACT, saturates
from qcompress.errors import ContractError, MachineError
from qcompress.models import FAMILIES
from qcompress.models.architecture import PAST
from qcompress.models.checkpoint_files import read_config
from qcompress.models.folded import assemble
from qcompress.models.named_outputs import joined, outputs_in
from qcompress.models.plan import rounded
from qcompress.models.prepare import replace_module
from qcompress.models.rebuild import rebuild
from qcompress.quant.dynamic import DynamicActivation
from qcompress.schema.quantizers import Dynamic, Lsq, MinMax
from qcompress.system.artifacts import FloatModel, FoldedModel, TrainedModel, disabled_optimizers, read_json

if TYPE_CHECKING:
    from collections.abc import Sequence


class Runner(Protocol):
    """Function from inputs to logits."""

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Compute the logits."""


class TorchRunner:
    """Runner of a torch model of a supported family."""

    def __init__(self, model: nn.Module, family: str, device: torch.device) -> None:
        self.model, self.family, self.device = model.to(device), family, device

    @torch.inference_mode()
    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: tensor.to(self.device) for name, tensor in complete(self.family, inputs).items()}
        return self.model(**tensors).logits.float().cpu().numpy()


REWRITERS = ("WeightBiasQuantization",)
"""Optimizers of ONNX Runtime's basic level that change a graph's results. This one rounds the float bias of a
convolution between Q/DQ nodes to int32, by at most half a unit of the accumulator, and flips later rounding
ties. TensorRT keeps such a bias in float.
"""


OUTPUTS = ("logits", "embeddings")
"""Outputs of a graph that are compared between rows; a graph has one of them, and the key-value cache."""

CPU = "CPUExecutionProvider"


def open_session(
    file: Path, threads: int, optimized: bool, provider: str = CPU, options_of: dict[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """Open an ONNX Runtime session with this package's settings; `optimized` as in `OnnxRunner`, `options_of`
    are the provider's options. On a processor whose products of 8-bit codes saturate they are made exact.

    An external graph may need some optimizers disabled; certificate.json beside it lists them. ONNX Runtime
    continues without a provider that does not start; this function raises MachineError.
    """
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_ENABLE_BASIC
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as exceptions; the log prints raw node names
    # spinning idle threads take processor time from other processes
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    without = {*disabled_optimizers(file), *(() if optimized else REWRITERS)}
    if optimized and provider == CPU and saturates():
        options.add_session_config_entry(*EXACT)
    if provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        str(file),
        options,
        providers=[(provider, options_of or {})],
        disabled_optimizers=sorted(without) or None,
        # with fallback, a provider that fails now or in a later run is silently replaced by the CPU
        **({} if provider == CPU else {"enable_fallback": 0}),
    )
    if provider not in session.get_providers():
        raise MachineError(
            f"ONNX Runtime's {provider} does not start on this machine",
            fix="install the libraries that this version of ONNX Runtime was built for",
        )
    return session


def usable_providers() -> tuple[str, ...]:
    """Providers of this ONNX Runtime build. CUDA's libraries are loaded from torch's and NVIDIA's pip
    packages.
    """
    with redirect_stdout(sys.stderr):  # it prints missing libraries to stdout
        onnxruntime.preload_dlls()
    return tuple(onnxruntime.get_available_providers())


def assigned_nodes(session: onnxruntime.InferenceSession) -> dict[str, int] | None:
    """Number of nodes assigned to each provider; None if this ONNX Runtime does not record it."""
    if not hasattr(session, "get_provider_graph_assignment_info") or session.get_providers()[0] == CPU:
        return None
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def graph_inputs_of(file: Path) -> dict[str, list[int | str]]:
    """Axes of each graph input, as names or sizes."""
    return {item.name: list(item.shape) for item in open_session(file, 1, optimized=False).get_inputs()}


ELEMENTS = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
    "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(bool)": np.bool_,
}  # fmt: skip
"""numpy types of graph inputs."""


def fed(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Select the graph's inputs and cast them to its types; an external graph may lack some, or take
    int32.
    """
    known = {item.name: ELEMENTS[item.type] for item in session.get_inputs() if item.name in inputs}
    return {name: inputs[name].astype(kind, copy=False) for name, kind in known.items()}


class OnnxRunner:
    """Runner of an ONNX file on ONNX Runtime, by default on its CPU provider.

    `optimized=False` stops at the basic level and computes the graph as written. At the default level int4
    weights become MatMulNBits, which rounds the activations to int8, and int8 layers become integer matmuls.
    """

    def __init__(
        self, file: Path, family: str, threads: int, optimized: bool, provider: str = CPU,
        options_of: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.family = family
        self.session = open_session(file, threads, optimized, provider, options_of)
        self.outputs = compared_outputs(self.session, file.parent, family)

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        arrays = {name: tensor.numpy() for name, tensor in complete(self.family, inputs).items()}
        feed = fed(self.session, arrays)
        feed |= empty_past(self.session, len(next(iter(inputs.values()))))
        return compared_array(self.session.run(self.outputs, feed), self.family)


def compared_array(arrays: Sequence[np.ndarray], family: str) -> np.ndarray:
    """The compared outputs as one array, fp32; those of a user's module side by side, [batch, values]."""
    return arrays[0].astype(np.float32) if FAMILIES[family].INPUTS else joined(arrays)


def compared_outputs(session: onnxruntime.InferenceSession, folder: Path, family: str) -> list[str]:
    """Names of the outputs that are compared: `logits`, or `embeddings`; of a user's module all that the
    config.json in the graph's `folder` lists. Raises ContractError without them.
    """
    if not FAMILIES[family].INPUTS:
        return [output.name for output in outputs_in(read_config(folder))]
    names = [item.name for item in session.get_outputs()]
    for name in OUTPUTS:
        if name in names:
            return [name]
    raise ContractError(f"the graph has the outputs {', '.join(names)}, and none of {', '.join(OUTPUTS)}")


def empty_past(session: onnxruntime.InferenceSession, rows: int) -> dict[str, np.ndarray]:
    """Empty key-value cache for a graph that has one: [rows, heads, 0, width]."""
    return {
        item.name: np.zeros((rows, item.shape[1], 0, item.shape[3]), ELEMENTS[item.type])
        for item in session.get_inputs()
        if item.name.startswith(PAST)
    }


def float_runner(model: FloatModel, device: torch.device) -> TorchRunner:
    """Runner of the unmodified float model of the library."""
    family = read_json(model.path / "float.json")["family"]
    return TorchRunner(FAMILIES[family].load_float(model.source, model.path), family, device)


def trained_runner(model: FloatModel, trained: TrainedModel, device: torch.device) -> TorchRunner:
    """Runner of the trained model, with the rounding of training."""
    prepared = rebuild(model, trained)
    return TorchRunner(prepared.model, prepared.family, device)


def made_static(trained: TrainedModel) -> tuple[str, ...]:
    """Layers and points whose dynamic activation ranges became static at the end of training."""
    return tuple(read_json(trained.path / "trained.json").get("static_ranges", ()))


def dynamic_runner(
    model: FloatModel, trained: TrainedModel, options: MinMax | Lsq | Dynamic, device: torch.device
) -> TorchRunner:
    """Runner of the trained model with dynamic activation ranges restored, at layers and points, as before
    `observer.make_static`. `options`: the recipe's activation quantizer. Raises ContractError unless it is
    dynamic.

    Weights are rounded as in `trained_runner`. A range covers the whole tensor, including padding: logits of
    a sequence depend on the other sequences in its batch.
    """
    if not isinstance(options, Dynamic):
        raise ContractError(
            f"{trained.path} was trained with dynamic activations, and quantizer.activations is "
            f"{options.name}",
            fix="measure the model with the recipe of its training",
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
    """Runner of the folded model: integers and scales in torch, fp32 arithmetic; `integer`: int8 layers as
    exact integer sums.
    """
    family = read_json(folded.path / "folded.json")["family"]
    return TorchRunner(assemble(folded, integer=integer), family, device)


def complete(family: str, inputs: dict[str, np.ndarray], past: int = 0) -> dict[str, torch.Tensor]:
    """All inputs of the family's graph, as tensors; `past`: number of tokens in the key-value cache."""
    more = {"past": past} if past else {}
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return FAMILIES[family].graph_inputs(**tensors, **more)
