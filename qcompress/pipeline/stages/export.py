"""Stage `export`: FoldedModel -> OnnxModel, an ONNX graph with explicit Q/DQ, linted and certified.

Reads folded.safetensors. Writes model.onnx (+ model.onnx.data above 1.5 GiB), lint.json, certificate.json,
sizes.json, config.json and the tokenizer or preprocessor files. Initializers have their names of
folded.safetensors and Q/DQ nodes the names of their layers, so that messages of TensorRT's parser name a
layer. The file contains no path and no time.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor, nn

from qcompress.encodings import CODES, ENCODINGS, encoding_of
from qcompress.errors import ExportError
from qcompress.graph.certificate.points import certify_all
from qcompress.graph.keep_fp32 import keep_fp32, require_operators
from qcompress.graph.lint.lint import lint, refuse_errors
from qcompress.graph.onnxruntime_forms import adapt
from qcompress.graph.optimizer import optimize
from qcompress.graph.shared_decoders import decode_apart
from qcompress.graph.sizes import measure_sizes
from qcompress.models import FAMILIES, graph_signature
from qcompress.models.architecture import Input
from qcompress.models.checkpoint_files import read_config
from qcompress.models.folded import assemble
from qcompress.models.layer_selection import lent_prefixes
from qcompress.models.named_outputs import outputs_in
from qcompress.models.plan import LayerPlan, PointPlan, plans_from_json, points_from_json, sharers
from qcompress.models.pooling import output_name
from qcompress.pipeline.single_trace import single_trace
from qcompress.quant.types import COMPUTE
from qcompress.schema.recipe import Export
from qcompress.schema.targets import TARGETS
from qcompress.system.artifacts import FoldedModel, read_json, write_json

EXTERNAL_BYTES = 3 * 2**29
"""Initializers above this total size go into a separate file: a protobuf message is limited to 2 GiB."""

SHOWN = 400
"""Characters of the exporter's message that are shown."""

PREFIX = "model."
"""Prefix that the wrapper module adds to every name."""


class _Logits(nn.Module):
    """The model as a function from tensors to logits or embeddings. Float inputs are fp32 for every compute
    type.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._run(inputs).logits

    def _run(self, inputs: dict[str, Tensor]) -> Any:
        return self.model(
            **{name: x.to(self.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        )


class _Outputs(_Logits):
    """A user's module as a function from tensors to its outputs."""

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._run(inputs).outputs.values())


def export(folded: FoldedModel, options: Export, target: str, provenance: dict[str, str], out: Path) -> None:
    """Write the graph with its lint, certificate and sizes files. Raises ExportError (exit code 5) for lint
    errors and an incomplete certificate.

    `provenance` becomes metadata of the file: recipe hash, version, method.
    """
    facts = read_json(folded.path / "folded.json")
    plan = plans_from_json(facts["plan"])
    points = points_from_json(facts.get("points", []))
    program = _trace(folded, facts["family"], COMPUTE[facts["compute"]], options)
    model, stored = program.model, _Stored.of(folded, facts["family"], plan)
    optimize(model, lambda name: stored.is_apart(name.removeprefix(PREFIX)))
    _name(model, plan, stored.name)
    if TARGETS[target].backend is not None:
        decode_apart(model)
    for encoding in ENCODINGS:
        encoding.lower(model)
    for item in plan:
        if item.weights is not None and not item.layer.tied_to:
            encoding_of(item.weights).pack(model.graph.initializers, item.name, item.weights)
    if TARGETS[target].backend is None:
        adapt(model, _nonnegative(plan, points, folded))
    if options.keep_fp32:
        require_operators(model, options.keep_fp32)
        keep_fp32(model, options.keep_fp32, load_file(folded.path / "folded.safetensors"))
    _strip(model)
    formats = {
        item.name: {"weights": str(item.weights), "activations": str(item.activations or "float")}
        for item in plan
        if item.weights
    }
    model.metadata_props.clear()
    model.metadata_props.update({f"qcompress.{key}": value for key, value in sorted(provenance.items())})
    model.metadata_props["qcompress.formats"] = json.dumps(formats, sort_keys=True)
    model.producer_name, model.producer_version = "qcompress", provenance["version"]
    model.doc_string = None
    file = out / "model.onnx"
    _save(model, file)
    onnx.checker.check_model(str(file), full_check=True)

    write_json(out / "sizes.json", measure_sizes(file, plan, facts["raised"]))
    certificate = certify_all(file, folded.path, plan, points)
    write_json(out / "certificate.json", certificate)
    findings = lint(file, TARGETS[target])
    write_json(out / "lint.json", {"target": target, "findings": [asdict(finding) for finding in findings]})
    for name in folded.path.iterdir():
        if name.suffix in (".json", ".txt", ".jinja") and name.name not in ("folded.json", "manifest.json"):
            shutil.copyfile(name, out / name.name)
    if not certificate["complete"]:
        everything = [*certificate["layers"], *certificate["points"]]
        broken = [item["name"] for item in everything if not item["passed"]]
        raise ExportError(
            f"the ONNX file differs from the folded model: {broken or certificate['float_copies']}",
            fix="this is a defect of the exporter: please report it with certificate.json",
        )
    refuse_errors(findings, target, "this graph")


def _trace(folded: FoldedModel, family: str, dtype: torch.dtype, options: Export) -> torch.onnx.ONNXProgram:
    model, arguments, shapes, inputs, outputs = _signature(folded, FAMILIES[family], dtype, options)
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # hides the warning that torchvision, which is not needed, is not installed
    with warnings.catch_warnings(), single_trace():
        # raised inside torch.export for its own data structures; a user cannot act on them
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            return torch.onnx.export(
                model,
                kwargs=arguments,
                dynamo=True,
                opset_version=options.opset,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                optimize=False,  # `graph.optimizer.optimize` is called later
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(
                f"torch's exporter makes no graph of this model: {_summary(str(error))}",
                fix="change the operations that it names, such as branches on values or on shapes",
            ) from error
        finally:
            log.setLevel(level)


def _summary(message: str) -> str:
    """The exporter's exception without its advice, in one line."""
    said = message.rpartition("## Exception summary")[2].partition("(Refer to the full stack trace")[0]
    return " ".join(said.split())[:SHOWN]


def _signature(
    folded: FoldedModel, family: ModuleType, dtype: torch.dtype, options: Export
) -> tuple[nn.Module, dict[str, Any], dict[str, Any], list[str], list[str]]:
    """Return the model as a function of tensors, example arguments, their symbolic axes, and the names of
    inputs and outputs.
    """

    def axes(names: Mapping[int, str | int]) -> dict[int, str]:
        return {index: name for index, name in names.items() if name in (*options.dynamic, "total")}

    model = assemble(folded, dtype)
    # sizes that no model dimension equals, so that no axis is mistaken for a constant
    rows, tokens, past = 2, 5, 7
    signature = graph_signature(family, folded.path)
    sizes, config = {"batch": rows, "sequence": tokens}, read_config(folded.path)

    def ones(item: Input) -> Tensor:
        shape = [sizes.get(axis, axis) for axis in item.axes]
        return torch.ones(shape, dtype=getattr(torch, item.element))

    given = ones(signature[0])
    if not options.cache:
        shapes = {item.name: axes(dict(enumerate(item.axes))) for item in signature}
        if outputs := [output.name for output in outputs_in(config)]:
            example = {item.name: ones(item) for item in signature}
            return _Outputs(model, dtype), {"inputs": example}, {"inputs": shapes}, list(example), outputs
        example = _declared(signature, family.graph_inputs(given))
        output = output_name(config)
        return _Logits(model, dtype), {"inputs": example}, {"inputs": shapes}, list(example), [output]
    from qcompress.models.cache import Cached

    layout = family.cache_layout(config)
    cached = Cached(model, layout)
    example = _declared(signature, family.graph_inputs(given, past=past))
    shapes = {item.name: axes(dict(enumerate(item.axes))) for item in signature}
    shapes["attention_mask"] = axes({0: "batch", 1: "total"})
    arguments = {"inputs": example, "past": cached.empty(rows, past, dtype)}
    dynamic = {"inputs": shapes, "past": [axes({0: "batch", 2: "past"})] * len(layout.past)}
    return cached, arguments, dynamic, [*example, *layout.past], ["logits", *layout.present]


def _declared(signature: tuple[Input, ...], example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Example arguments of the graph's inputs; a family may make inputs that a model does not take."""
    return {item.name: example[item.name] for item in signature}


@dataclass(frozen=True)
class _Stored:
    """Tensor names of folded.safetensors, and the map from the exporter's names to them."""

    names: frozenset[str]
    tied: Mapping[str, str]
    """Map of tied layer -> layer that owns the weight."""
    firsts: Mapping[str, str]
    """Map of block prefix -> prefix of the block that stores the shared weights."""

    @classmethod
    def of(cls, folded: FoldedModel, family: str, plan: tuple[LayerPlan, ...]) -> _Stored:
        """Read the names from the folded model and its plan."""
        with safe_open(folded.path / "folded.safetensors", framework="np") as tensors:
            names = frozenset(tensors.keys())
        tied = {item.name: item.layer.tied_to for item in plan if item.layer.tied_to}
        depth = FAMILIES[family].DEPTH
        firsts = lent_prefixes(read_config(folded.path), depth) if depth is not None else {}
        return cls(names, tied, firsts)

    def name(self, exported: str) -> str:
        """Map an exported tensor name to its stored name. They differ for a tied table and for weights shared
        by blocks, which the exporter names after the last reader.
        """
        layer, _, part = exported.partition(".weight.")
        if layer in self.tied and part:
            return f"{self.tied[layer]}.weight.{part}"
        block = next((block for block in self.firsts if exported.startswith(block)), None)
        other = exported if block is None else self.firsts[block] + exported[len(block) :]
        return exported if exported in self.names or other not in self.names else other

    def is_apart(self, exported: str) -> bool:
        """True if a tensor keeps a separate initializer: every stored tensor except activation scales."""
        name = self.name(exported)
        return name in self.names and (not name.endswith(".scale") or name.endswith(".weight.scale"))


def _name(model: ir.Model, plan: tuple[LayerPlan, ...], stored: Callable[[str], str]) -> None:
    """Rename initializers to their names in folded.safetensors (`stored`), and Q/DQ nodes and their outputs
    after their layers, in place.
    """
    for value in list(model.graph.initializers.values()):
        name = stored(value.name.removeprefix(PREFIX))
        if name != value.name:
            value.name = name
            if value.const_value is not None:
                value.const_value.name = name
    layers = _layers_of_matmuls(model, plan)
    counts: dict[str, int] = {}
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        # equal activation scales are stored once, so the scale may have the name of another layer
        read, layer = node.inputs[0].name, _reader(node, layers)
        scale = f"{layer}.input.scale" if layer else node.inputs[1].name
        what = (read if read.endswith(".codes") else scale).rpartition(".")[0]
        name = f"{what}/{node.op_type}"
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        node.outputs[0].name = node.name + "_output"


def _reader(node: ir.Node, layers: dict[ir.Node, str]) -> str | None:
    """Name of the layer whose matmul reads an activation's Q or DQ node; `layers`: layer of each matmul."""
    for user, _ in node.outputs[0].uses():
        if user.op_type in ("Clip", "DequantizeLinear"):
            return _reader(user, layers)
        if user in layers:
            return layers[user]
    return None


def _nonnegative(plan: tuple[LayerPlan, ...], points: tuple[PointPlan, ...], folded: FoldedModel) -> set[str]:
    """Names of the Q/DQ pairs of values that are never negative. The pair of a point may have the name of any
    other pair of equal scale, so that names whose scale a signed point has too are left out.
    """
    names = {f"{item.name}.input" for item in plan if item.layer.nonnegative}
    names |= {item.name for item in points if item.point.nonnegative}
    with safe_open(folded.path / "folded.safetensors", framework="np") as tensors:
        stored = {name.removesuffix(".scale") for name in list(tensors.keys())}
        signed = [item.name for item in points if not item.point.nonnegative and item.name in stored]
        taken = {tensors.get_tensor(f"{name}.scale").tobytes() for name in signed}
        return {name for name in names & stored if tensors.get_tensor(f"{name}.scale").tobytes() not in taken}


def _layers_of_matmuls(model: ir.Model, plan: tuple[LayerPlan, ...]) -> dict[ir.Node, str]:
    """Layer name of each matmul with a quantized weight. Matmuls that share a weight are assigned to the
    layers in the order of the plan, each as many as the layer has calls.
    """
    calls = {item.name: item.layer.calls for item in plan}
    layers: dict[ir.Node, str] = {}
    waiting = {
        owner: [name for name in names for _ in range(calls[name])] for owner, names in sharers(plan).items()
    }
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            owners = [owner for value in node.inputs[:2] if (owner := _owner(value))]
            if owners and waiting.get(owners[0]):
                layers[node] = waiting[owners[0]].pop(0)
    return layers


def _owner(value: ir.Value | None) -> str | None:
    """Name of the layer that owns the codes from which a value is decoded, or None."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Transpose":
        node = node.inputs[0].producer()
    codes = node.inputs[0].name if node is not None and node.inputs and node.inputs[0] is not None else ""
    owner, _, part = (codes or "").rpartition(".weight.")
    return owner if part in CODES else None


def _strip(model: ir.Model) -> None:
    """Remove the exporter's metadata, which contains absolute paths and would change the file's hash."""
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        value.metadata_props.clear()


def _save(model: ir.Model, file: Path) -> None:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    kinds = {value.dtype for value in model.graph.initializers.values()}
    # int4 tensors came with IR 10, int2 with IR 13
    model.ir_version = max(model.ir_version, 13 if ir.DataType.INT2 in kinds else 10)
    if size > EXTERNAL_BYTES:
        ir.save(model, file, external_data=file.name + ".data")
    else:
        ir.save(model, file)
