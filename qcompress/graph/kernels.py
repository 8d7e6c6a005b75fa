"""Kernels of the quantized layers in the graph that ONNX Runtime executes, for sizes.json. No torch.

ONNX Runtime rewrites a graph when it opens it. `kernels` writes the rewritten graph to a temporary folder and
looks up each layer of a plan by the name of its codes, or by the name of its output: an optimizer may rename,
transpose or repack a tensor. The result depends on the processor: on x86-64, activations are uint8.
"""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import NodeProto

from qcompress.encodings import CODES, encoding_of
from qcompress.encodings.walk import DEQUANTIZE, MOVES, attribute, is_a, operand, result, way_to
from qcompress.graph.joined import layers_of
from qcompress.graph.lint.onnxruntime import obstacles, product_of
from qcompress.graph.view import View, read
from qcompress.models.plan import LayerPlan

INTEGER = (
    "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QLinearConv",
    "ConvInteger", "QAttention",
)  # fmt: skip
"""Operators of ONNX Runtime that multiply integers."""

WEIGHT_ONLY = ("MatMulNBits", "MatMulBnb4")
"""Operators that decode the weight block by block while they multiply."""

PRODUCTS = (
    "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose",
)  # fmt: skip
"""Operators that multiply floats."""

FORMS = ("unknown", "decoded", "constant", "weight-only", "codes", "integer")
"""Forms of a layer, worst first. `integer`: an integer kernel; `codes`: rows of codes are looked up, then
decoded; `weight-only`: decoded in the kernel; `constant`: a float copy, made when the session opens;
`decoded`: to floats in each run; `unknown`: not recognised.
"""

NO_ENGINE = (
    "an engine lists its kernels only on its device: probe/measure_engine.py asks the engine inspector there "
    "and writes `kernels` to engine.json"
)
"""Reason why export does not ask an engine."""

ORIGIN = re.compile(rf"^(?:FusedBack_|InsertedPrecisionFreeCast_)*(.*\.weight\.(?:{'|'.join(CODES)}))")
"""Name of a tensor that ONNX Runtime made from codes: it adds suffixes, and prefixes in half precision."""

INSERTED = "InsertedPrecisionFreeCast_"
"""Prefix of values that ONNX Runtime computes in fp32 instead of fp16."""

FILE = "optimized.onnx"


def owners(view: View) -> dict[str, str]:
    """Owner of each layer's stored weight, by layer."""
    owner_of: dict[str, str] = {}
    for name in view.constants:
        owner, _, part = name.rpartition(".weight.")
        if owner and part in CODES:
            owner_of |= dict.fromkeys(layers_of(owner), owner)
    return owner_of


def kernels(file: Path, plan: tuple[LayerPlan, ...]) -> dict[str, Any]:
    """Kernels of the plan's quantized layers, by runtime: {"onnxruntime": {...}, "engine": {...}}.

    `read` is False, with a `reason`, if a runtime was not asked, refused the file or found no room for the
    rewritten graph. Raises ExportError only for a graph that `view.read` refuses. Otherwise `layers` has
    name, operator, form (one of FORMS), reason and decoded_bytes of each layer, and the rest are counts:
    `integer` of `products` (matmuls and convolutions), `codes` of `tables`, and the bytes of weights that are
    decoded to floats in each run or copied as floats.
    """
    answer: dict[str, Any] = {"machine": platform.machine(), "provider": "CPUExecutionProvider"}
    reason, layers = "", []
    try:
        with tempfile.TemporaryDirectory(prefix=".kernels-", dir=file.parent) as folder:
            version, reason = _optimize(file, Path(folder) / FILE)
            answer["version"] = version
            if not reason:
                layers = list(_layers(read(file), read(Path(folder) / FILE), plan))
    except OSError as error:
        reason = f"the optimized graph cannot be written: {error.strerror or error}"
    answer |= {"read": not reason, "reason": reason or None} | ({} if reason else _counts(layers))
    return {"onnxruntime": answer, "engine": {"read": False, "reason": NO_ENGINE}}


def _optimize(file: Path, optimized: Path) -> tuple[str | None, str]:
    """Write the graph that ONNX Runtime executes, its tensors beside it. Returns the version, and the reason
    why the graph was not written.
    """
    try:
        import onnxruntime
    except ImportError as error:
        return None, f"onnxruntime is not installed ({error})"
    from qcompress.graph.ort_errors import ORT_ERRORS

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(optimized)
    # a protobuf message is limited to 2 GiB
    for key, value in (("file_name", optimized.name + ".data"), ("min_size_in_bytes", "1024")):
        options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    try:
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        text = str(error).replace(f"{file.parent}/", "")
        return onnxruntime.__version__, f"ONNX Runtime refuses the graph: {text[:300]}"
    return onnxruntime.__version__, ""


# Layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """A node that computes with a weight or looks its rows up."""

    node: NodeProto
    form: str
    decoder: NodeProto | None = field(repr=False)
    """First node that decodes the weight, None if the node reads codes."""


UNKNOWN = Use(NodeProto(), "unknown", None)
"""Use of a weight that the optimized graph does not show."""


def _uses(view: View, heads: list[str]) -> tuple[list[Use], set[str]]:
    """Uses of a weight, in the order of the nodes, and the names of its stored or computed forms. `heads`:
    constants that hold it.
    """
    uses: dict[int, Use] = {}
    names: set[str] = set()
    queue: list[tuple[str, NodeProto | None]] = [(name, None) for name in heads]
    while queue:
        name, decoder = queue.pop()
        if name in names:
            continue
        names.add(name)
        for node in view.readers.get(name, []):
            view.steps.take()
            op = node.op_type
            if op in INTEGER or op in WEIGHT_ONLY or op == "GatherBlockQuantized":
                form = "integer" if op in INTEGER else "weight-only" if op in WEIGHT_ONLY else "codes"
                uses.setdefault(id(node), Use(node, form, None))
            elif op in PRODUCTS:
                form = "constant" if decoder is None else "decoded"
                uses.setdefault(id(node), Use(node, form, decoder))
            elif op == "Gather" and operand(node, 0) == name and operand(node, 1) not in view.fixed:
                is_codes = decoder is None and not view.is_float(name)
                form = "codes" if is_codes else "constant" if decoder is None else "decoded"
                uses.setdefault(id(node), Use(node, form, decoder))
            elif op in (*MOVES, "Cast", DEQUANTIZE, "Gather", "Mul", "Clip") and node.output:
                decodes = op in (DEQUANTIZE, "Gather", "Mul")
                queue += [
                    (output, node if decodes and decoder is None else decoder) for output in node.output
                ]
    return sorted(uses.values(), key=lambda use: view.places[id(use.node)]), names


def _layers(
    source: View, optimized: View, plan: tuple[LayerPlan, ...]
) -> Iterator[tuple[dict[str, Any], tuple[int, str]]]:
    """Entry of each quantized layer, in the order of the plan, and a key: layers with one key read one
    decoded weight. `source`: the graph before it is optimized.
    """
    owner_of, heads = owners(source), _heads(optimized)
    waiting: dict[str, int] = {}
    for item in plan:
        if item.weights is None:
            continue
        weight = item.layer.tied_to or item.name
        owner, is_table = owner_of.get(weight), item.layer.kind == "embedding"
        if owner is None:
            yield _entry(item, UNKNOWN, "model.onnx does not store its codes", 0), (0, item.name)
            continue
        codes = f"{owner}.weight.{encoding_of(item.weights).parts[0]}"
        before, names = _uses(source, [codes])
        after, _ = _uses(optimized, heads.get(codes, []) + _constants(optimized, names))
        before, after = ([use for use in uses if _is_look_up(use) is is_table] for uses in (before, after))
        place = waiting.get(owner, 0) if len(layers_of(owner)) == 1 else 0
        waiting[owner] = place + (not is_table)
        first = before[place] if place < len(before) else None
        use = _matching(optimized, first, after)
        entry = _entry(item, use, _reason(source, use, first, is_table), _width(source, owner))
        yield entry, (id(use.decoder or use.node), weight)


def _heads(optimized: View) -> dict[str, list[str]]:
    """Constants of the optimized graph by the codes that their name tells."""
    heads: dict[str, list[str]] = {}
    for name in optimized.constants:
        if match := ORIGIN.match(name):
            heads.setdefault(match[1], []).append(name)
    return heads


def _constants(optimized: View, names: set[str]) -> list[str]:
    """Constants that ONNX Runtime computed when it opened the graph, named after values of the graph."""
    candidates = (form for name in names for form in (name, f"FusedBack_{name}", INSERTED + name))
    return sorted(name for name in candidates if name in optimized.constants)


def _is_look_up(use: Use) -> bool:
    return "Gather" in use.node.op_type


def _matching(optimized: View, before: Use | None, after: list[Use]) -> Use:
    """Use in the optimized graph that computes what `before` computes; the worst if that is unknown."""
    node = before and _same_value(optimized, before.node)
    for use in after:
        if use.node is node:
            return use
    use = UNKNOWN if node is None else _use_of(optimized, node)
    return use if use is not UNKNOWN else min(after, key=lambda use: FORMS.index(use.form), default=UNKNOWN)


def _use_of(optimized: View, node: NodeProto) -> Use:
    """Use of a node whose weight ONNX Runtime renamed, from the operands of the node."""
    if node.op_type in (*INTEGER, *WEIGHT_ONLY):
        return Use(node, "integer" if node.op_type in INTEGER else "weight-only", None)
    for name in node.input[:2] if node.op_type in PRODUCTS else ():
        way = way_to(optimized, optimized.producers.get(name))
        maker = next((item for item in way if item.op_type not in (*MOVES, "Cast")), None)
        if is_a(maker, DEQUANTIZE) and operand(maker, 0) in optimized.fixed:
            return Use(node, "decoded", maker)
        if name in optimized.constants:
            return Use(node, "constant", None)
    return UNKNOWN


def _same_value(optimized: View, node: NodeProto) -> NodeProto | None:
    """Node of the optimized graph with the output of `node`, which keeps its name unless it was fused with
    its readers.
    """
    names = (result(node), INSERTED + result(node))
    return next((optimized.producers[name] for name in names if name in optimized.producers), None)


def _width(source: View, owner: str) -> int:
    """Bytes of a decoded element."""
    scale, table = (source.constants.get(f"{owner}.weight.{part}") for part in ("scale", "centroids"))
    stored = scale if scale is not None else table
    return source.bits(stored.name) // 8 if stored is not None else 4


def _entry(item: LayerPlan, use: Use, reason: str | None, width: int) -> dict[str, Any]:
    """Entry of a layer; `width`: bytes of a decoded element."""
    floats = use.form in ("decoded", "constant")
    return {
        "name": item.name,
        "table": item.layer.kind == "embedding",
        "operator": use.node.op_type or None,
        "form": use.form,
        "reason": reason,
        "decoded_bytes": item.layer.weights * width if floats else 0,
    }


def _reason(source: View, use: Use, before: Use | None, is_table: bool) -> str | None:
    """Reason why a layer does not run on integers; None if it does."""
    if use.form in ("integer", "codes"):
        return None
    if use.form == "unknown":
        return "the optimized graph does not tell its kernel"
    if use.form == "weight-only":
        level = attribute(use.node, "accuracy_level", 0)
        how = "inputs rounded to int8 by blocks in each run" if level == 4 else "float products"
        bits = attribute(use.node, "bits", 4)
        return f"{use.node.op_type}: weights of {bits} bits, {how} (accuracy level {level})"
    if use.form == "constant":
        return "decoded when the session opens: it holds a float copy"
    if is_table:
        return "decoded in each run: the table is decoded before Gather"
    product = product_of(source, before.node) if before is not None else None
    texts = list(obstacles(source, product).values()) if product is not None else []
    if before is not None and product is None:
        texts = ["the weight is looked up in a codebook"]
    return "decoded in each run: " + (
        "; ".join(texts) or f"DequantizeLinear and {use.node.op_type} were not fused"
    )


def _counts(layers: list[tuple[dict[str, Any], tuple[int, str]]]) -> dict[str, Any]:
    """The entries and their totals; bytes that several layers read count once."""
    entries = [entry for entry, _ in layers]
    forms = [entry["form"] for entry in entries]
    floats: dict[str, dict[tuple[int, str], int]] = {"decoded": {}, "constant": {}}
    for entry, key in layers:
        if entry["form"] in floats:
            floats[entry["form"]][key] = entry["decoded_bytes"]
    return {
        "layers": entries,
        "products": sum(not entry["table"] for entry in entries),
        "integer": forms.count("integer"),
        "weight_only": forms.count("weight-only"),
        "tables": sum(entry["table"] for entry in entries),
        "codes": forms.count("codes"),
        "decoded_bytes": sum(floats["decoded"].values()),
        "constant_bytes": sum(floats["constant"].values()),
    }
