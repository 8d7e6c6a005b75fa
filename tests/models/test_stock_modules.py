"""Norms, tables and batch norms of other classes than torch's: their own code runs, trained and folded."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from hand_made import HandMade, linear, randomise
from lines import plain_session
from onnx import numpy_helper
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5LayerNorm

from qcompress.errors import ContractError, ModelError
from qcompress.models.architecture import Layer, Site
from qcompress.models.plan import LayerPlan
from qcompress.models.prepare import quantize
from qcompress.pipeline.stages.export import export
from qcompress.quant.batchnorm import statistics
from qcompress.quant.folded import FoldedStockEmbedding
from qcompress.quant.layers import QuantizedStockEmbedding
from qcompress.quant.rescaling import FixedScale, MappedScale, RescaledNorm
from qcompress.schema.formats import CodebookFormat
from qcompress.schema.quantizers import Codebook, Lsq
from qcompress.schema.recipe import Export
from qcompress.system.artifacts import FoldedModel, read_json

WIDTH, ROWS = 12, 20


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Norms ------------------------------------------------------------------------------------------------


class Frozen(nn.LayerNorm):
    """A LayerNorm of another class with the same forward."""


NORMS: dict[str, tuple[Any, int, tuple[int, ...], int]] = {
    "llama": (lambda: LlamaRMSNorm(WIDTH), 0, (2, 3, WIDTH), -1),
    "t5": (lambda: T5LayerNorm(WIDTH), 0, (2, 3, WIDTH), -1),
    "torch": (lambda: nn.RMSNorm(WIDTH), 0, (2, 3, WIDTH), -1),
    "gemma": (lambda: Gemma3RMSNorm(WIDTH), 1, (2, 3, WIDTH), -1),
    "no-bias": (lambda: nn.LayerNorm(WIDTH, bias=False), 0, (2, 3, WIDTH), -1),
    "layer-norm": (lambda: Frozen(WIDTH), 0, (2, 3, WIDTH), -1),
    "group": (lambda: nn.GroupNorm(3, WIDTH), 0, (2, WIDTH, 4, 4), 1),
    "batch": (lambda: nn.BatchNorm2d(WIDTH), 0, (2, WIDTH, 4, 4), 1),
    "batch-1d": (lambda: nn.BatchNorm1d(WIDTH), 0, (2, WIDTH, 4), 1),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_rescaled_norm_is_the_stock_norm_with_folded_parameters(name: str) -> None:
    make, offset, shape, axis = NORMS[name]
    norm = randomise(make())
    x, scale = random(*shape, seed=3), random(WIDTH, seed=2).mul(0.7).exp()
    state = torch.get_rng_state()
    rescaled = RescaledNorm(norm, FixedScale(scale)).eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert rescaled.offset == offset and {*dict(rescaled.named_parameters())} == {
        *dict(norm.named_parameters())
    }
    expected = (norm(x).movedim(axis, -1) * scale).movedim(-1, axis)
    torch.testing.assert_close(rescaled(x), expected, rtol=1e-5, atol=1e-5)
    plain = copy.deepcopy(norm)
    with torch.no_grad():
        for part, value in rescaled.folded().items():
            plain.get_parameter(part).copy_(value)
    assert torch.equal(rescaled(x), plain(x))


def test_a_norm_whose_weight_is_0_still_shows_its_offset() -> None:
    norm = Gemma3RMSNorm(WIDTH)
    assert not bool(norm.weight.any()) and RescaledNorm(norm, FixedScale(torch.ones(WIDTH))).offset == 1


class Squared(nn.Module):
    """A norm that squares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.square()


@pytest.mark.parametrize(
    "norm", [Squared(), nn.LayerNorm(WIDTH, elementwise_affine=False), nn.GRUCell(2, WIDTH)]
)
def test_a_module_that_takes_no_factor_is_refused(norm: nn.Module) -> None:
    with pytest.raises(ModelError, match=type(norm).__name__) as caught:
        RescaledNorm(norm, FixedScale(torch.ones(WIDTH)))
    assert "adapter: none" in caught.value.fix


def test_a_rescaled_batch_norm_keeps_its_statistics_under_their_names() -> None:
    model = nn.Sequential(nn.BatchNorm2d(WIDTH))
    names = [name for name, _ in statistics(model)]
    model[0] = RescaledNorm(model[0], FixedScale(torch.full((WIDTH,), 2.0)))
    model.double().train()(1 + random(4, WIDTH, 3, 3).double())  # the stock module's own buffers stay fp32
    after = dict(statistics(model))
    assert [*after] == names and float(after["0.running_mean"].mean()) > 0.05


# Tables -----------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Tables whose classes scale their rows or shift their positions, a norm, and a tied head with a bias."""

    def __init__(self, scaled: nn.Embedding) -> None:
        super().__init__()
        self.table, self.positions = scaled, OPTLearnedPositionalEmbedding(8, WIDTH)
        self.norm, self.fc = Gemma3RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.table(input_ids) + self.positions(torch.ones_like(input_ids))
        return SimpleNamespace(logits=self.head(x + self.fc(self.norm(x)).to(self.fc.weight.dtype)))


TABLES = {
    "gemma": lambda: Gemma3TextScaledWordEmbedding(ROWS, WIDTH, 0, embed_scale=3.5),
    "bart": lambda: BartScaledWordEmbedding(ROWS, WIDTH, 0, embed_scale=0.25),
}
IDS = torch.tensor([[3, 4, 0, 19, 7], [1, 0, 0, 2, 2]])


@pytest.fixture
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HandMade:
    model = randomise(Reader(TABLES[request.param]()))
    layers = linear(model, "table", "positions", kind="embedding") + linear(model, "fc")
    layers += linear(model, "head", kind="head", tied_to="table")
    sites = [Site("norm", ("fc",), WIDTH)]
    return HandMade(model, layers, sites, lambda model: model(IDS).logits, tmp_path, monkeypatch, Lsq())


@pytest.mark.parametrize("reader", TABLES, indirect=True)
def test_tables_with_a_forward_of_their_own_train_and_fold(reader: HandMade) -> None:
    prepared = reader.prepared()
    assert isinstance(prepared.layers["table"], QuantizedStockEmbedding)
    tables = [prepared.layers[name] for name in ("table", "positions")]
    prepared.model.train()
    before = [table.weight.clone() for table in tables]
    optimizer = torch.optim.SGD(prepared.model.parameters(), lr=0.1)
    reader.forward(prepared.model).square().mean().backward()
    assert all(
        bool(part.grad.any()) for table in tables for part in table.parameters() if part.grad is not None
    )
    assert all(sum(part.grad is not None for part in table.parameters()) == 2 for table in tables)
    optimizer.step()
    assert not any(torch.equal(table.weight, old) for table, old in zip(tables, before, strict=True))
    prepared.model.eval()
    with torch.no_grad():
        trained = reader.forward(prepared.model)
        rebuilt, folded = reader.folded(prepared)
        assert torch.equal(reader.forward(rebuilt.model), trained)
        assert torch.equal(reader.forward(folded), trained)
        for name, decoded in (
            ("table", folded.table.weight.decoded()),
            ("positions", folded.positions.weight.decoded()),
        ):
            torch.testing.assert_close(decoded, prepared.layers[name].quantized_weight(), rtol=0, atol=0)


@pytest.mark.parametrize("reader", ["gemma"], indirect=True)
def test_such_a_table_is_int8_in_the_graph_and_its_head_shares_it(reader: HandMade, tmp_path: Path) -> None:
    with torch.no_grad():
        _, folded = reader.folded(reader.prepared())
        expected = reader.forward(folded).numpy()
    assert isinstance(folded.positions, FoldedStockEmbedding)
    out = tmp_path / "export"
    out.mkdir()
    export(FoldedModel(tmp_path / "fold"), Export(), "rtx-ada", {"version": "0"}, out)
    assert read_json(out / "certificate.json")["complete"]
    graph = onnx.load(out / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert stored["table.weight.codes"].dtype == stored["positions.weight.codes"].dtype == "int8"
    assert max(array.size for array in stored.values() if array.dtype == "float32") <= ROWS
    readers = [node.op_type for node in graph.node if "table.weight.codes" in node.input]
    assert set(readers) <= {"DequantizeLinear", "Transpose"}
    session = plain_session(out / "model.onnx", optimized=True)
    (logits,) = session.run(None, {"input_ids": IDS.numpy()})
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_codebook_of_such_a_table_is_refused() -> None:
    model = nn.ModuleDict({"table": TABLES["gemma"]()})
    plan = LayerPlan(linear(model, "table", kind="embedding")[0], CodebookFormat(block=4), None, Codebook())
    with pytest.raises(ModelError, match=r"table: Gemma3TextScaledWordEmbedding computes more") as caught:
        quantize(model, "hand-made", (plan,))
    assert "float" in caught.value.fix


class Masked(nn.Module):
    """A head whose bias the model holds under two names, as BERT's masked language model does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(ROWS))
        self.table, self.decoder = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS)
        self.decoder.weight, self.decoder.bias = self.table.weight, self.bias

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.decoder(self.table(input_ids))


def test_a_tied_head_keeps_a_bias_with_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Masked())
    layers = linear(model, "table", kind="embedding") + linear(model, "decoder", kind="head", tied_to="table")
    one = HandMade(model, layers, [], lambda model: model(IDS), tmp_path, monkeypatch)
    prepared = one.prepared()
    with torch.no_grad():
        trained = one.forward(prepared.model)
        rebuilt, folded = one.folded(prepared)
        assert torch.equal(one.forward(rebuilt.model), trained)
        assert torch.equal(one.forward(folded), trained)
    assert torch.equal(folded.decoder.bias, model.bias)


# What stock code reads of a layer ---------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["gemma"], indirect=True)
def test_replacements_have_the_attributes_of_stock_layers(reader: HandMade) -> None:
    prepared = reader.prepared()
    _, folded = reader.folded(prepared)
    for model in (prepared.model, folded):
        assert (model.table.num_embeddings, model.table.embedding_dim) == (ROWS, WIDTH)
        assert (model.fc.in_features, model.fc.out_features, len(model.fc.bias)) == (WIDTH, WIDTH, WIDTH)
        assert (model.head.in_features, model.head.out_features, len(model.head.bias)) == (WIDTH, ROWS, ROWS)
        for layer in (model.table, model.fc, model.head):
            assert layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


# Convolutions and batch norms -------------------------------------------------------------------------


class BatchNormAct(nn.BatchNorm2d):
    """A batch norm that drops and activates its output, as timm's does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Net(nn.Module):
    """Convolutions, one grouped, a transposed one and a 1-d one, each with a batch norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), BatchNormAct(8)
        self.second, self.third = nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 4, 1)
        self.up, self.up_norm = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.BatchNorm2d(4)
        self.line, self.line_norm = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.norm(self.first(x))))
        x = self.up_norm(self.up(x))
        return self.line_norm(self.line(x.flatten(2)))


PIXELS = random(2, 3, 9, 9, seed=4)


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HandMade:
    model = randomise(Net())
    for seed, (_, buffer) in enumerate(statistics(model)):
        if buffer.is_floating_point():
            buffer.copy_(random(*buffer.shape, seed=seed).abs() + 0.2)
    first, second, third = linear(model, "first", "second", "third", kind="conv")
    layers: list[Layer] = [replace(first, norm="norm"), replace(second, groups=4), third]
    shuffled = (2, 0, -1, 1, 3, -1, -1, 4)
    sites = [
        Site("first", ("second",), 5, "value", outputs=(1, 3, 0, 4, 7), maps=(shuffled,)),
        Site("second", ("third",), 8, "value"),
    ]

    def forward(model: nn.Module) -> Tensor:
        return model(PIXELS.to(next(model.parameters()).dtype))

    return HandMade(model, layers, sites, forward, tmp_path, monkeypatch)


@pytest.mark.parametrize("writer", ["first", "norm"])
def test_convolutions_write_and_read_rescaled_channels(net: HandMade, writer: str) -> None:
    net.sites[0] = replace(net.sites[0], writer=writer, kind="norm" if writer == "norm" else "value")
    net.scales[writer] = net.scales["first"]
    with torch.no_grad():
        rescaled, expected = net.forward(net.rescaled()), net.forward(net.model.double())
    assert float((rescaled - expected).abs().max()) < 1e-12 * float(expected.abs().max())


def test_the_activation_inside_a_folded_batch_norm_stays(net: HandMade) -> None:
    prepared = net.prepared(activations=False)
    with torch.no_grad():
        trained = net.forward(prepared.model)
        rebuilt, folded = net.folded(prepared)
        assert torch.equal(net.forward(rebuilt.model), trained)
        torch.testing.assert_close(net.forward(folded), trained, rtol=1e-4, atol=1e-5)
    assert [*dict(folded.norm.named_children())] == ["drop", "act"]
    assert torch.equal(folded.norm.act.weight, net.model.norm.act.weight)


def test_other_batch_norms_stay_as_they_are(net: HandMade) -> None:
    _, folded = net.folded(net.prepared())
    for name in ("up_norm", "line_norm"):
        norm, stock = folded.get_submodule(name), net.model.get_submodule(name)
        assert type(norm) is type(stock)
        for key, value in stock.state_dict().items():
            assert torch.equal(norm.state_dict()[key], value)


def test_an_input_that_two_sites_write_is_divided_by_both(tmp_path: Path, monkeypatch) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.b(x), self.a(x)], -1))

    model = randomise(Joined())
    sites = [
        Site("a", ("out",), 3, "value", maps=((-1, -1, 0, 1, 2),)),
        Site("b", ("out",), 2, "value", maps=((0, 1, -1, -1, -1),)),
    ]
    x = random(6, 4, seed=9)

    def forward(model: nn.Module) -> Tensor:
        return model(x.to(model.out.bias.dtype))

    one = HandMade(model, linear(model, "a", "b", "out"), sites, forward, tmp_path, monkeypatch)
    with torch.no_grad():
        rescaled, expected = forward(one.rescaled()), forward(copy.deepcopy(model).double())
    assert float((rescaled - expected).abs().max()) < 1e-12
    prepared = one.prepared()
    with torch.no_grad():
        assert torch.equal(forward(one.folded(prepared)[1]), forward(prepared.model))


@pytest.mark.parametrize("reader", ["gemma"], indirect=True)
def test_a_layer_that_shares_its_weight_reads_no_rescaled_channels(reader: HandMade) -> None:
    prepared = reader.prepared()
    with pytest.raises(ContractError, match="head shares its weight"):
        prepared.rescale(Site("fc", ("head",), WIDTH, "value"), FixedScale(torch.ones(WIDTH)))


def test_a_mapped_scale_passes_the_gradients_of_every_place() -> None:
    scale = nn.Module()
    scale.theta = nn.Parameter(torch.ones(2))
    scale.forward = lambda: scale.theta
    seen = MappedScale(scale, [1, -1, 1, 0])()
    (seen * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert scale.theta.grad.tolist() == [1000.0, 101.0]
