from __future__ import annotations

import pytest

from qcompress.errors import UsageError
from qcompress.models.architecture import Layer
from qcompress.models.plan import LayerPlan
from qcompress.recipe.rules.targets import refusals
from qcompress.schema.formats import ActivationFormat, WeightFormat
from qcompress.schema.targets import TARGETS, Refusal, find_target

INT8, INT4 = WeightFormat(bits=8), WeightFormat(bits=4, block=128)
SHORT_BLOCKS = WeightFormat(bits=4, block=64)
INT4_CHANNELS, INT4_IN_INT8 = WeightFormat(bits=4), WeightFormat(bits=4, container="int8")
ACTIVATIONS = ActivationFormat()

SM = {
    "cpu": None, "rtx-turing": 75, "rtx-ampere": 86, "rtx-ada": 89, "rtx-blackwell": 120, "t4": 75, "a10": 86,
    "a100": 80, "l4": 89, "l40s": 89, "h100": 90, "h200": 90, "b200": 100, "orin-jp6": 87, "orin-jp7": 87,
    "thor": 110,
}  # fmt: skip

each_target = pytest.mark.parametrize("name", TARGETS)


def linears(
    weights: WeightFormat | None, activations: ActivationFormat | None, count: int = 3, features: int = 768
) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(Layer(f"h.{index}.fc", "linear", features, 3072), weights, activations)
        for index in range(count)
    )


def table(weights: WeightFormat | None, activations: ActivationFormat | None = None) -> tuple[LayerPlan, ...]:
    """An embedding and the head that is tied to it."""
    return (
        LayerPlan(Layer("wte", "embedding", 768, 50257), weights, None),
        LayerPlan(Layer("lm_head", "head", 768, 50257, tied_to="wte"), weights, activations),
    )


def only(reported: list[Refusal]) -> Refusal:
    assert len(reported) == 1, reported
    return reported[0]


def test_the_table_holds_the_compute_capabilities_of_the_devices() -> None:
    assert {name: target.sm for name, target in TARGETS.items()} == SM


@each_target
def test_a_target_says_what_it_is_for_in_one_sentence(name: str) -> None:
    target = TARGETS[name]
    assert target.name == name
    assert target.note.endswith(".")
    assert ". " not in target.note
    assert (target.backend is None) == (target.versions == ()) == (target.sm is None) == (name == "cpu")
    assert target.backend == (
        "tensorrt_rtx" if name.startswith("rtx-") else None if name == "cpu" else "tensorrt"
    )


@pytest.mark.parametrize(
    ("name", "version", "builds"),
    [
        ("rtx-ada", "1.7.1.116", True), ("rtx-ada", "1.4.0.76", False), ("rtx-ada", "2.0.0", False),
        ("h100", "11.4.0.106", True), ("h100", "10.16.1.11", False), ("h100", "12", False),
        ("h100", "12.0.0", False), ("h100", "11", True),
        ("orin-jp6", "10.3.0", True), ("orin-jp6", "10.2.0", False), ("orin-jp6", "11.4.1.5", False),
        ("orin-jp7", "10.14.1", True), ("orin-jp7", "11.4.0.106", False), ("thor", "11.4.1.5", True),
        ("thor", "11.10.0", True),
    ],
)  # fmt: skip
def test_a_target_takes_the_versions_that_ship_for_it(name: str, version: str, builds: bool) -> None:
    assert TARGETS[name].accepts(version) is builds


def test_the_requirement_names_every_range() -> None:
    assert TARGETS["thor"].requirement == "tensorrt >=10.3,<11 or >=11.4.1,<12"


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown target 'rtx-pascal'(.|\n)*rtx-turing") as error:
        find_target("rtx-pascal")
    assert error.value.exit_code == 2


@each_target
def test_int8_weights_and_activations_in_fp16_suit_every_target(name: str) -> None:
    plan = (*linears(INT8, ACTIVATIONS), *table(INT8, ACTIVATIONS))
    assert refusals(TARGETS[name], plan, "fp16") == []


def test_a_target_may_be_given_by_its_name() -> None:
    plan = linears(INT8, ACTIVATIONS)
    assert refusals("t4", plan, "bf16") == refusals(TARGETS["t4"], plan, "bf16") != []


@each_target
@pytest.mark.parametrize(
    ("activations", "key", "words"),
    [
        (ActivationFormat(granularity="channel"), "granularity", "one for|one per channel"),
        (ActivationFormat(symmetric=False), "symmetric", "no zero point but 0"),
    ],
)
def test_no_target_takes_activations_with_several_scales_or_a_zero_point(
    name: str, activations: ActivationFormat, key: str, words: str
) -> None:
    refusal = only(refusals(TARGETS[name], linears(INT8, activations), "fp16"))
    assert refusal.key == f"format.activations.{key}"
    assert any(word in refusal.message for word in words.split("|"))
    assert "h.0.fc and 2 other layers" in refusal.message
    assert refusal.fix


def test_two_causes_are_two_refusals() -> None:
    activations = ActivationFormat(bits=4, granularity="channel", symmetric=False)
    keys = [refusal.key for refusal in refusals("rtx-ada", linears(INT8, activations), "fp16")]
    assert sorted(keys) == [f"format.activations.{key}" for key in ("granularity", "symmetric")]


@pytest.mark.parametrize("compute", ["fp32", "fp16", "bf16"])
@each_target
def test_a_compute_type_is_refused_where_there_is_no_matmul_of_it(name: str, compute: str) -> None:
    without_bf16 = ("cpu", "rtx-turing", "t4")
    refused = (compute == "bf16" and name in without_bf16) or (compute == "fp32" and name == "rtx-turing")
    reported = refusals(TARGETS[name], linears(INT8, ACTIVATIONS), compute)
    assert [refusal.key for refusal in reported] == ["format.compute"] * refused
    assert all("set `compute: fp16`" in refusal.fix for refusal in reported)


@each_target
def test_int4_is_refused_on_turing_alone(name: str) -> None:
    plan = (*linears(INT4, None), *table(INT4))
    refused = refusals(TARGETS[name], plan, "fp16")
    keys = ["format.weights.bits", "format.embeddings.bits"] if SM[name] == 75 else []
    assert [refusal.key for refusal in refused] == keys
    assert all("SM75" in refusal.message for refusal in refused)


@each_target
def test_four_bits_in_an_int8_container_suit_every_target(name: str) -> None:
    assert refusals(TARGETS[name], linears(INT4_IN_INT8, ACTIVATIONS), "fp16") == []


@pytest.mark.parametrize(("features", "block", "best"), [(192, 128, 64), (96, 64, 32), (320, 128, 64)])
def test_a_block_that_does_not_divide_names_the_largest_that_does(
    features: int, block: int, best: int
) -> None:
    plan = linears(WeightFormat(bits=4, block=block), None, features=features)
    refusal = only(refusals("cpu", plan, "fp32"))
    assert refusal.key == "format.weights.block"
    assert refusal.message.startswith("h.0.fc and 2 other layers: ")
    assert f"{features} input features do not divide into blocks of {block}" in refusal.message
    assert f"set `block: {best}`" in refusal.fix


@pytest.mark.parametrize("block", [32, 64, 128])
def test_a_block_that_divides_is_no_refusal(block: int) -> None:
    assert refusals("cpu", linears(WeightFormat(bits=4, block=block), None, features=3200), "fp32") == []


def test_a_layer_that_no_block_divides_is_told_to_do_without() -> None:
    refusal = only(refusals("cpu", linears(INT4, None, count=1, features=100), "fp32"))
    assert refusal.message.startswith("h.0.fc: 100 input features")
    assert "no block size divides 100: drop `block`" in refusal.fix


def test_a_block_that_does_not_divide_a_table_is_told_at_the_embeddings() -> None:
    wide = (LayerPlan(Layer("wte", "embedding", 100, 50257), INT4, None),)
    assert only(refusals("cpu", wide, "fp32")).key == "format.embeddings.block"


@each_target
def test_int4_blocks_with_int8_activations_are_refused_where_the_builder_dies(name: str) -> None:
    refused = refusals(TARGETS[name], linears(SHORT_BLOCKS, ACTIVATIONS), "fp16")
    keys = {refusal.key for refusal in refused} - {"format.weights.bits"}
    assert keys == ({"format.weights.block"} if name.startswith("rtx-") else set())


def test_a_single_block_of_int4_with_int8_activations_is_slow_and_no_refusal() -> None:
    assert refusals("rtx-ada", linears(INT4, ACTIVATIONS, features=128), "fp16") == []


def test_int4_without_blocks_is_slow_and_no_refusal() -> None:
    assert refusals("rtx-ada", linears(INT4_CHANNELS, ACTIVATIONS), "fp16") == []


def test_a_float_model_suits_every_target() -> None:
    assert len(TARGETS) == 16
    for target in TARGETS.values():
        assert refusals(target, (*linears(None, None), *table(None)), "fp16") == []
