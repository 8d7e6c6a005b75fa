"""Rules of targets: layer formats that a target cannot build. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qcompress.models.plan import LayerPlan
from qcompress.schema.targets import BLOCKS, Refusal, Target, find_target


def refusals(target: Target | str, plan: tuple[LayerPlan, ...], compute: str) -> list[Refusal]:
    """Refusals of a target (or of the target with that name): one for each cause, whatever the number of
    layers.

    Limits on activations hold for every target: exported graphs have one scale and no zero point for the
    input of a layer, because TensorRT accepts nothing else.
    """
    target = find_target(target) if isinstance(target, str) else target
    return [
        *_refuse_activations(target, plan),
        *_refuse_compute(target, compute),
        *_refuse_int4(target, plan),
        *_refuse_blocks(plan),
        *_refuse_int4_gemm(target, plan),
        *_refuse_kernels(target, plan),
    ]


def _name(layers: list[LayerPlan]) -> str:
    """Name of the first layer, and the number of other layers."""
    others = len(layers) - 1
    return layers[0].name + (f" and {others} other layer{'s' if others > 1 else ''}" if others else "")


def _key(layer: LayerPlan, field: str) -> str:
    return f"format.{layer.layer.section}.{field}"


def _group(plan: tuple[LayerPlan, ...], key: Callable[[LayerPlan], str | None]) -> dict[str, list[LayerPlan]]:
    """Layers by key; layers with the key None are omitted."""
    groups: dict[str, list[LayerPlan]] = {}
    for layer in plan:
        if name := key(layer):
            groups.setdefault(name, []).append(layer)
    return groups


def _refuse_activations(target: Target, plan: tuple[LayerPlan, ...]) -> Iterator[Refusal]:
    who = "TensorRT" if target.backend else f"target {target.name}, like TensorRT,"
    quantized = [layer for layer in plan if layer.activations]
    channel = [layer for layer in quantized if layer.activations.granularity == "channel"]
    if channel:
        yield Refusal(
            "format.activations.granularity",
            f"{who} takes one scale for a whole activation; {_name(channel)} asks for one per channel",
            "set `granularity: tensor`; `method: quadapter` moves outlying channels into the weights",
        )
    asymmetric = [layer for layer in quantized if not layer.activations.symmetric]
    if asymmetric:
        yield Refusal(
            "format.activations.symmetric",
            f"{who} takes no zero point but 0; the input of {_name(asymmetric)} is asymmetric",
            "set `symmetric: true`",
        )


def _refuse_compute(target: Target, compute: str) -> Iterator[Refusal]:
    if compute not in target.compute:
        yield Refusal(
            "format.compute",
            f"target {target.name} has no {compute} matmul",
            f"set `compute: {target.compute[-1]}`, or name another build.target",
        )


def _refuse_int4(target: Target, plan: tuple[LayerPlan, ...]) -> Iterator[Refusal]:
    def key(layer: LayerPlan) -> str | None:
        refused = layer.integers and layer.weights.stored_bits not in target.weight_bits
        return _key(layer, "bits") if refused else None

    for name, layers in _group(plan, key).items():
        bits = layers[0].weights.stored_bits
        fix = "set `bits: 8`, or for linear layers `{bits: 4, container: int8}`"
        if bits == 2 and 4 in target.weight_bits:
            fix = "set `container: int4`, or name the target `cpu`"
        yield Refusal(
            name,
            f"target {target.name} (SM{target.sm}) has no int{bits}; {_name(layers)} is stored in it",
            fix,
        )


def _refuse_blocks(plan: tuple[LayerPlan, ...]) -> Iterator[Refusal]:
    def key(layer: LayerPlan) -> str | None:
        uneven = layer.block and layer.layer.kind != "conv" and layer.layer.in_features % layer.block
        return _key(layer, "block") if uneven else None

    for name, layers in _group(plan, key).items():
        features, block = layers[0].layer.in_features, layers[0].block
        best = max((size for size in BLOCKS if features % size == 0), default=None)
        yield Refusal(
            name,
            f"{_name(layers)}: {features} input features do not divide into blocks of {block}",
            f"set `block: {best}`, the largest that divides {features}" if best else
            f"no block size divides {features}: drop `block`, or set the layer to int8 in format.layers",
        )  # fmt: skip


def _refuse_kernels(target: Target, plan: tuple[LayerPlan, ...]) -> Iterator[Refusal]:
    """Refuse convolutions other than int8 codes without blocks (nvidia-modelopt's README: "TensorRT only
    supports FP8 and INT8 for convolution operations"; TensorRT-RTX 1.7 parses no blocks and builds no int4
    beside an int8 input).
    """
    who = "TensorRT" if target.backend else f"target {target.name}, like TensorRT,"

    def key(layer: LayerPlan) -> str | None:
        if layer.layer.kind != "conv" or layer.weights is None:
            return None
        if not layer.integers:  # its decoded weight is float in the graph
            return None
        if layer.block:
            return _key(layer, "block")
        return _key(layer, "container") if layer.weights.stored_bits != 8 else None

    for name, layers in _group(plan, key).items():
        weights = layers[0].weights
        stored = f"blocks of {weights.block}" if weights.block else f"int{weights.stored_bits}"
        ternary = ", ternary: true" if weights.ternary else ""
        yield Refusal(
            name,
            f"{who} takes convolutions of int8 codes with a scale for each output channel, and not {stored}: "
            f"{_name(layers)}",
            "drop `block`"
            if weights.bits == 8
            else f"write {{bits: {weights.bits}{ternary}, container: int8}}",
        )


def _refuse_int4_gemm(target: Target, plan: tuple[LayerPlan, ...]) -> Iterator[Refusal]:
    """Refuse int4 blocks times int8 activations: TensorRT-RTX 1.7 dies on several int4 blocks times an int8
    activation of rank 3 (CHECK is_constant).
    """

    def key(layer: LayerPlan) -> str | None:
        blocks = layer.block and layer.layer.kind != "conv" and layer.layer.in_features > layer.block
        refused = blocks and layer.weights.stored_bits == 4 and layer.activations
        return _key(layer, "block") if refused else None

    if target.backend != "tensorrt_rtx":
        return
    for name, layers in _group(plan, key).items():
        yield Refusal(
            name,
            f"target {target.name} cannot multiply int4 blocks by an int8 activation, as in {_name(layers)}",
            "set `activations: float`, or weights `{bits: 4, container: int8}` for an int8 matmul",
        )
