"""Discovery is repeatable, leaves the model as it was, and gives values that JSON can hold."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import zoo
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qcompress.models.structure import Structure, discover


@pytest.mark.parametrize("name", ["phi3", "own net"])
def test_a_structure_survives_json_and_two_runs_are_equal(name: str) -> None:
    sample = zoo.build(name)
    structure = discover(sample.model, sample.inputs, sample.again)
    assert Structure.from_json(json.loads(json.dumps(structure.to_json()))) == structure
    assert discover(sample.model, sample.inputs, sample.again) == structure


def hooks(model: nn.Module) -> int:
    """Number of hooks, and of modules with a forward of their own."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        for module in model.modules()
    )


def test_the_model_and_torch_are_unchanged_afterwards() -> None:
    sample = zoo.build("gemma2")
    model = sample.model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    assert model.config.use_cache
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    identities = [id(parameter) for parameter in model.parameters()]
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    random = torch.get_rng_state()
    discover(model, sample.inputs, sample.again)
    assert torch.equal(torch.get_rng_state(), random)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert "eager" not in ALL_ATTENTION_FUNCTIONS
    assert [module.training for module in model.modules()] == modes
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks(model) == 0 and model.config.use_cache and torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_random_state_is_restored_for_a_model_that_draws() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + 0 * torch.rand(1)

    model = Drawing()
    random = torch.get_rng_state()
    discover(model, {"x": torch.ones(2, 4)})
    assert torch.equal(torch.get_rng_state(), random)


def test_the_model_is_unchanged_after_an_error() -> None:
    sample = zoo.build("llama")
    sample.model.train()
    with pytest.raises(TypeError):
        discover(sample.model, {"input_ids": "none"})
    assert hooks(sample.model) == 0 and sample.model.training and sample.model.config.use_cache


def test_without_sites_nothing_else_changes() -> None:
    sample = zoo.build("llama")
    whole, bare = discover(sample.model, sample.inputs), discover(sample.model, sample.inputs, sites=False)
    assert whole.sites and bare.sites == () and bare.norms == {}
    assert bare.to_json() | {"sites": 0, "norms": 0} == whole.to_json() | {"sites": 0, "norms": 0}


def test_attentions_have_the_sizes_of_their_cache() -> None:
    sample = zoo.build("llama")
    structure = discover(sample.model, sample.inputs, sites=False)
    assert structure.attentions == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert structure.key_values == ((2, 8), (2, 8))
    parts = {layer.name.rpartition(".")[2]: layer.part for layer in structure.layers}
    assert {name for name, part in parts.items() if part == "attention"} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert {name for name, part in parts.items() if part == "ffn"} == {"gate_proj", "up_proj", "down_proj"}
    assert (parts["embed_tokens"], parts["lm_head"]) == ("rest", "rest")


def test_layers_and_blocks_stand_in_call_order() -> None:
    """ConvNeXt, T5 and others register modules in another order than they call them."""
    for name in ("distilbert", "own net"):
        sample = zoo.build(name)
        structure = discover(sample.model, sample.inputs, sites=False)
        called: list[str] = []
        names = {module: name for name, module in sample.model.named_modules()}
        with nn.modules.module.register_module_forward_pre_hook(
            lambda module, args, called=called, names=names: called.append(names.get(module, ""))
        ):
            sample.model(**sample.inputs)
        for stated in ([layer.name for layer in structure.layers], list(structure.blocks)):
            assert stated == sorted(stated, key=called.index) and len(stated) > 1


def test_experts_are_named_as_uncovered() -> None:
    sample = zoo.build("mixtral")
    structure = discover(sample.model, sample.inputs, sites=False)
    name, shape = structure.uncovered[0]
    assert name.endswith("mlp.experts.gate_up_proj") and shape == (4, 96, 32)
    assert structure.covered < 0.5


def test_stages_are_not_blocks() -> None:
    for name, block in (
        ("swin", "swin.encoder.layers.0.blocks.0"),
        ("resnet", "resnet.encoder.stages.0.layers.0"),
    ):
        sample = zoo.build(name)
        assert discover(sample.model, sample.inputs, sites=False).blocks[0] == block


def test_a_list_inside_a_block_is_not_a_list_of_blocks() -> None:
    """MobileBERT's blocks hold a list of feed-forward layers, beside their attention."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
            self.inner = nn.Sequential(Inner(), Inner())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.after(self.inner(self.before(x)))

    model = nn.Sequential(Outer(), Outer())
    assert discover(model, {"input": torch.randn(2, 4)}, sites=False).blocks == ("0", "1")


def test_a_structure_is_read_without_torch() -> None:
    code = "import sys, qcompress.models.structure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
