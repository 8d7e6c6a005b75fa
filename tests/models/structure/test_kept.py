"""Structures of whole models from reduced ones, and their cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qcompress.errors import MachineError, ModelError
from qcompress.models.kept_folder import FOLDER
from qcompress.models.structure import discover, kept
from qcompress.models.structure.reduced import fill_random, meta_model, reduce
from qcompress.models.structure.whole import image_inputs, text_inputs

LLM = dict(
    vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=699,
)  # fmt: skip
IMAGES = {"num_channels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}}
DECODER, PICTURES = "AutoModelForCausalLM", "AutoModelForImageClassification"
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (DECODER, LLM),
    "gemma2": (DECODER, LLM | {"sliding_window": 4, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}),
    "phi3": (DECODER, LLM | {"sliding_window": None}),
    "gpt2": (DECODER, dict(vocab_size=700, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "gpt_neox": (DECODER, LLM),
    "mobilenet_v2": (PICTURES, IMAGES | {"image_size": 32, "depth_multiplier": 0.35, "tf_padding": False}),
    "vit": (PICTURES, IMAGES | dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=16,
        patch_size=4,
    )),
}  # fmt: skip


def config(name: str) -> dict[str, Any]:
    return {"model_type": name, **CONFIGS[name][1]}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no structure in memory."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "structures"))
    monkeypatch.setattr(kept, "_READ", {})
    return tmp_path / "structures"


FEW = ("llama", "gemma2", "vit")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in CONFIGS]
)
def test_a_reduced_model_has_the_structure_of_the_whole_one(name: str, own_cache: Path) -> None:
    """Discovery in every block of the whole model finds what one block of each kind says."""
    auto, values = CONFIGS[name]
    settings = transformers.AutoConfig.for_model(name, **{**values, "architectures": []})
    made = getattr(transformers, auto).from_config(settings, attn_implementation="eager").eval()
    if hasattr(made.config, "use_cache"):
        made.config.use_cache = False
    with torch.random.fork_rng(devices=()):
        fill_random(made, seed=1)
    inputs = text_inputs if auto == DECODER else image_inputs
    whole = discover(made, inputs(made, 7), inputs(made, 12), representative=False)
    found = kept.structure_of(auto, config(name)).structure
    assert {layer.name: layer for layer in found.layers} == {layer.name: layer for layer in whole.layers}
    assert found.blocks == whole.blocks and found.attentions == whole.attentions
    assert {site.writer: site for site in found.sites} == {site.writer: site for site in whole.sites}
    assert found.sites
    assert (found.norms, found.floats, found.key_values) == (whole.norms, whole.floats, whole.key_values)
    assert found.parameters == whole.parameters == sum(value.numel() for value in made.parameters())
    assert found.covered == pytest.approx(whole.covered)
    assert dict(found.uncovered) == dict(whole.uncovered)


@pytest.mark.parametrize(("name", "count"), [("llama", 1), ("gemma2", 2), ("mobilenet_v2", 11), ("vit", 1)])
def test_one_block_of_each_kind_is_left(name: str, count: int) -> None:
    """Gemma-2's blocks attend to all tokens and to a window in turn; those of MobileNetV2 all differ."""
    auto, _ = CONFIGS[name]
    reduced = reduce(auto, config(name))
    assert len(set(reduced.sources.values())) == count
    assert tuple(reduced.sources) == reduced.blocks
    assert all(value.device.type == "meta" for value in reduced.whole.parameters())
    if auto == DECODER:
        assert reduced.model.get_input_embeddings().weight.shape[0] == 512
        assert reduced.whole.get_input_embeddings().weight.shape[0] == 700


def test_buffers_that_no_checkpoint_holds_are_set() -> None:
    model = meta_model(DECODER, config("llama"))
    stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLM))
    assert torch.equal(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)


def test_a_structure_is_discovered_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept.structure_of(DECODER, config("llama"))
    (file,) = own_cache.glob("*.json")
    monkeypatch.setattr(kept, "discovered", pytest.fail)
    monkeypatch.setattr(kept, "_READ", {})
    renamed = {**config("llama"), "_name_or_path": "elsewhere", "transformers_version": "1"}
    assert kept.structure_of(DECODER, renamed) == first
    with pytest.raises(pytest.fail.Exception):
        kept.structure_of(DECODER, {**config("llama"), "num_hidden_layers": 5})
    file.write_text(file.read_text()[:-20])
    monkeypatch.setattr(kept, "_READ", {})
    with pytest.raises(pytest.fail.Exception):
        kept.structure_of(DECODER, config("llama"))


def test_a_cache_that_cannot_be_written_is_no_error(own_cache: Path) -> None:
    own_cache.write_text("a file in the place of the folder")
    assert kept.structure_of(DECODER, config("gpt2")).cache.heads == 4


def test_a_child_process_finds_the_same(own_cache: Path) -> None:
    text = json.dumps([DECODER, config("gpt2")])
    state = torch.get_rng_state()
    assert kept._in_child(text) == kept.discovered(text)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_error_of_a_child_process_is_its_own(own_cache: Path) -> None:
    with pytest.raises(ModelError, match="makes no model of model_type 'vit'"):
        kept._in_child(json.dumps([DECODER, config("vit")]))


def test_without_torch_an_unknown_structure_is_an_error_of_the_machine(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = kept.structure_of(DECODER, config("gpt2"))
    monkeypatch.setattr(kept, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(kept, "_READ", {})
    assert kept.structure_of(DECODER, config("gpt2")) == known
    with pytest.raises(MachineError, match="is not known, and discovering it needs torch") as error:
        kept.structure_of(DECODER, config("llama"))
    assert error.value.exit_code == 6 and "qcompress check" in error.value.fix


def test_values_of_which_no_model_can_be_made_are_named(own_cache: Path) -> None:
    for wrong in ({"model_type": "unheard-of"}, {**config("llama"), "hidden_act": "unheard-of"}):
        with pytest.raises(ModelError, match="makes no model of model_type"):
            kept.structure_of(DECODER, wrong)
