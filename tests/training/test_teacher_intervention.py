"""Distillation and Teacher Intervention: what is replaced, what is cut, what is compared, and when."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lines import plain_session
from tiny import make_recipe
from tiny_bert import LABELS, SEQUENCE, encoder_line, make_encoder, save_encoder, token_inputs
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import Architecture, Head
from qcompress.models.prepare import quantize
from qcompress.pipeline.keys import provenance
from qcompress.pipeline.stages.export import export
from qcompress.schema.method_options import Distillation, TeacherIntervention, TwoStep
from qcompress.schema.recipe import Train
from qcompress.training.methods import SCHEDULES
from qcompress.training.methods.activation_taps import Watch
from qcompress.training.methods.distillation import DistillationLoss, prediction_loss, scores_loss
from qcompress.training.methods.protocols import Scene
from qcompress.training.methods.teacher_intervention import INTERVENTION, Intervention, mode_at

MODES = ("output", "context", "attention")
FAMILY_NAMES = ("bert", "roberta", "distilbert")
BLOCK = "bert.encoder.layer.1."
QUERY, KEY, VALUE = (f"{BLOCK}attention.self.{name}.weight" for name in ("query", "key", "value"))
OUTPUT, INNER = f"{BLOCK}attention.output.dense.weight", f"{BLOCK}intermediate.dense.weight"


@pytest.fixture(scope="module")
def architectures(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Architecture]:
    found = {}
    for family in FAMILY_NAMES:
        folder = save_encoder(tmp_path_factory.mktemp(family), text_file, family)
        found[family] = describe(family, folder, Head(SEQUENCE, LABELS, "single_label_classification"))
    return found


Made = tuple[Intervention, nn.Module, nn.Module, dict[str, Tensor]]


@pytest.fixture
def intervene(architectures: dict[str, Architecture]) -> Callable[..., Made]:
    """An attached objective, its student, its teacher and a padded batch; no dropout, nothing rounded."""
    made: list[Intervention] = []

    def make(family: str = "bert", change: float = 0.0, phase: str = INTERVENTION, **options: object) -> Made:
        student, teacher = make_encoder(family), make_encoder(family)
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(change * torch.randn(parameter.shape, generator=random))
        objective = Intervention(TeacherIntervention(**options), lambda logits, batch: logits.mean())
        objective.attach(student, Scene(student, architectures[family], lambda: teacher))
        objective.begin(phase)
        made.append(objective)
        return objective, student, teacher, token_inputs(family, pad="right")

    yield make
    for objective in made:
        objective.detach()


def said(objective: Intervention, mode: str | None, batch: dict[str, Tensor]) -> Tensor:
    """The student's logits while the teacher's signals of this mode replace its own."""
    with torch.no_grad():
        objective.student.replace(mode, objective.teacher(**batch))
        try:
            return objective.student(**batch).logits
        finally:
            objective.student.replace(None, None)


# What is replaced ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_a_teacher_that_equals_the_student_changes_nothing(
    intervene: Callable[..., Made], family: str, mode: str
) -> None:
    objective, student, _, batch = intervene(family)
    stock = make_encoder(family)
    with torch.no_grad():
        expected = stock(**batch).logits
    torch.testing.assert_close(said(objective, mode, batch), expected, rtol=0, atol=1e-5)
    assert torch.equal(said(objective, None, batch), expected)


@pytest.mark.parametrize(
    ("mode", "cut", "kept"),
    [
        ("output", (QUERY, KEY, VALUE, OUTPUT), (INNER,)),
        ("context", (QUERY, KEY, VALUE), (OUTPUT, INNER)),
        ("attention", (QUERY, KEY), (VALUE, OUTPUT, INNER)),
    ],
)
def test_what_the_teacher_replaces_the_student_does_not_say(
    intervene: Callable[..., Made], mode: str, cut: tuple[str, ...], kept: tuple[str, ...]
) -> None:
    objective, student, teacher, batch = intervene(change=0.05)
    before = said(objective, mode, batch)
    for name in (*cut, *kept):
        weight = student.get_parameter(name)
        was = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
        assert torch.equal(said(objective, mode, batch), before) == (name in cut), name
        with torch.no_grad():
            weight.copy_(was)
    with torch.no_grad():
        teacher.get_parameter(QUERY if mode == "attention" else VALUE).mul_(1.5)
    assert not torch.equal(said(objective, mode, batch), before)


def sym(x: Tensor) -> Tensor:
    """Activation quantizer of TernaryBERT; below the clip is code -128 (see quant/dynamic.py)."""
    scale = x.clamp(-2.5, 2.5).abs().max() / 127
    return (x / scale).round().clamp(-128, 127) * scale


def twn(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Ternary weights with one threshold and one scale over these axes."""
    magnitude = weight.clamp(-2.5, 2.5).abs()
    kept = magnitude > 0.7 * magnitude.mean(axes, keepdim=True)
    scale = (magnitude * kept).sum(axes, keepdim=True) / kept.sum(axes, keepdim=True)
    return scale * weight.sign() * kept


def attention_by_hand(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: object):
    """Eager attention with Q, K, the probabilities and V rounded."""
    scores = sym(q) @ sym(k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + mask
    return (sym(scores.softmax(-1)) @ sym(v)).transpose(1, 2).contiguous(), None


def ternary_bert(model: nn.Module) -> nn.Module:
    """A stock BERT made TernaryBERT: all linear layers but the classifier, and the word embeddings by row."""
    AttentionInterface.register("ternary-bert", attention_by_hand)
    AttentionMaskInterface.register("ternary-bert", eager_mask)
    model.set_attn_implementation("ternary-bert")
    words = model.bert.embeddings.word_embeddings
    words.weight.data = twn(words.weight.data, (1,))
    layers = [item for name, item in model.named_modules() if isinstance(item, nn.Linear)]
    assert layers.pop() is model.classifier and len(layers) == 6 * 2 + 1
    for layer in layers:
        weight = twn(layer.weight.data, (0, 1))
        layer.register_forward_hook(
            lambda module, given, output, weight=weight: sym(given[0]) @ weight.t() + module.bias
        )
    return model


@pytest.mark.parametrize("phase", ["finetune", INTERVENTION])
def test_a_student_that_nobody_teaches_is_ternary_bert_to_the_last_bit(
    architectures: dict[str, Architecture], text_file: Path, tmp_path: Path, phase: str
) -> None:
    source = save_encoder(tmp_path / "source", text_file, "bert")
    own = {"*.position_embeddings": "float", "*.token_type_embeddings": "float", "classifier": "float"}
    form = {"preset": "ternary-a8", "attention": "int8", "layers": own}
    made = encoder_line(tmp_path / "line", source, text_file, "bert", format=form, quantizer="ternary")
    student = quantize(made.model("float"), "bert", made.plan, made.points).model
    objective = Intervention(TeacherIntervention(mode="attention"), lambda logits, batch: logits.mean())
    objective.attach(student, Scene(student, architectures["bert"], lambda: made.model("float")))
    objective.begin(phase)
    batch, logits = token_inputs("bert", pad="right"), []
    student.classifier.register_forward_hook(lambda module, given, output: logits.append(output))
    with torch.no_grad():
        objective.loss(batch, 0.0)
        expected = ternary_bert(make_encoder("bert"))(**batch).logits
    objective.detach()
    assert torch.equal(logits[0], expected) is (phase == "finetune")
    assert float((logits[0] - made.logits("float", batch)).abs().max()) > 0.1


# What learns -----------------------------------------------------------------------------------------


NOTHING = {"logits": 0.0, "attention": 0.0, "hidden": 0.0, "output": 0.0}
LEARNS = {"output": {INNER}, "context": {OUTPUT, INNER}, "attention": {VALUE, OUTPUT, INNER}}
"""What the loss of the prediction reaches in each mode (methods of the paper's table)."""


def learning(objective: Intervention, student: nn.Module, batch: dict[str, Tensor]) -> set[str]:
    """Which of the five weights get a gradient that is not exactly 0."""
    student.zero_grad()
    objective.loss({**batch, "labels": torch.zeros(4, dtype=torch.long)}, 0.0).backward()
    grads = {name: student.get_parameter(name).grad for name in (QUERY, KEY, VALUE, OUTPUT, INNER)}
    return {name for name, grad in grads.items() if grad is not None and bool(grad.abs().max() > 0)}


@pytest.mark.parametrize("mode", MODES)
def test_the_prediction_teaches_only_what_comes_after_the_teachers_signal(
    intervene: Callable[..., Made], mode: str
) -> None:
    objective, student, _, batch = intervene(change=0.05, mode=mode, **{**NOTHING, "logits": 1.0})
    assert learning(objective, student, batch) == LEARNS[mode]


@pytest.mark.parametrize("mode", MODES)
def test_query_and_key_learn_from_the_attention_scores_alone(
    intervene: Callable[..., Made], mode: str
) -> None:
    objective, student, _, batch = intervene(change=0.05, mode=mode, **{**NOTHING, "attention": 1.0})
    assert learning(objective, student, batch) == {QUERY, KEY}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    ("mode", "cut"),
    [
        ("output", ("query", "key", "value", "output")),
        ("context", ("query", "key", "value")),
        ("attention", ("query", "key")),
    ],
)
def test_without_the_loss_of_the_scores_what_is_cut_learns_nothing_in_any_attention(
    intervene: Callable[..., Made], architectures: dict[str, Architecture], family: str, mode: str,
    cut: tuple[str, ...],
) -> None:  # fmt: skip
    """With every other loss as it is by default. What is not cut learns in all of them."""
    objective, student, _, batch = intervene(family, change=0.05, mode=mode, attention=0.0)
    objective.loss({**batch, "labels": torch.zeros(4, dtype=torch.long)}, 0.0).backward()
    attentions = architectures[family].attentions
    assert len(attentions) == 2
    for attention in attentions:
        for role in ("query", "key", "value", "output"):
            layer = student.get_submodule(getattr(attention, role))
            learns = [p.grad is not None and bool((p.grad != 0).any()) for p in layer.parameters()]
            assert learns == [role not in cut] * 2, (attention.module, role)
    table = student.base_model.get_input_embeddings().weight.grad
    assert bool((table != 0).any())  # through the residual


@pytest.mark.parametrize(
    ("mode", "out_loss", "expected"),
    [
        ("output", "post_ln", set()),
        ("output", "pre_residual", {QUERY, KEY, VALUE, OUTPUT}),
        ("context", "post_ln", {OUTPUT}),
        ("attention", "post_ln", {VALUE, OUTPUT}),
        ("attention", "pre_residual", {VALUE, OUTPUT}),
    ],
)
def test_where_the_outputs_are_compared_decides_who_learns_from_them(
    intervene: Callable[..., Made], mode: str, out_loss: str, expected: set[str]
) -> None:
    """In the last block, whose own linear layers come after the compared output."""
    objective, student, _, batch = intervene(
        change=0.05, mode=mode, out_loss=out_loss, **{**NOTHING, "output": 1.0, "logits": 1e-30}
    )
    found = learning(objective, student, batch)
    assert found - {INNER} == expected


@pytest.mark.parametrize(
    ("mode", "term", "reached"),
    [
        ("output", "attention", False),
        ("context", "attention", False),
        ("attention", "attention", False),
        (None, "attention", True),
        ("output", "output", False),
        ("attention", "output", True),  # through V, whose input keeps its gradient
        (None, "output", True),
    ],
)
def test_what_lies_below_learns_nothing_through_the_layers_that_are_cut(
    intervene: Callable[..., Made], mode: str | None, term: str, reached: bool
) -> None:
    """The loss looks at the inside of the second attention; the linear layers of the first block feed it."""
    phase = INTERVENTION if mode else "finetune"
    options = {
        **NOTHING,
        term: 1.0,
        "logits": 0.0 if term == "attention" else 1e-30,
        "mode": mode or "output",
    }
    objective, student, _, batch = intervene(change=0.05, phase=phase, out_loss="pre_residual", **options)
    learning(objective, student, batch)
    grad = student.get_parameter("bert.encoder.layer.0.intermediate.dense.weight").grad
    assert (grad is not None and float(grad.abs().max()) > 1e-12) == reached


def test_without_intervention_everything_learns(intervene: Callable[..., Made]) -> None:
    objective, student, _, batch = intervene(change=0.05, phase="finetune")
    assert learning(objective, student, batch) == {QUERY, KEY, VALUE, OUTPUT, INNER}


# What is compared ------------------------------------------------------------------------------------


def by_hand(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """The losses from transformers' own outputs, in fp64 numpy; scores from the weights themselves."""
    outputs = []
    for model in (student, teacher):
        with torch.no_grad():
            found = model(**batch, output_hidden_states=True)
        hidden = [state.double().numpy() for state in found.hidden_states]
        scores = []
        for layer, x in zip(model.bert.encoder.layer, hidden[:-1], strict=True):
            heads = []
            for linear in (layer.attention.self.query, layer.attention.self.key):
                y = x @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
                heads.append(y.reshape(*y.shape[:2], 2, -1).transpose(0, 2, 1, 3))
            s = heads[0] @ heads[1].transpose(0, 1, 3, 2) / np.sqrt(heads[0].shape[-1])
            scores.append(s * batch["attention_mask"].numpy()[:, None, None, :])
        outputs.append((found.logits.double().numpy(), hidden, scores))
    (zs, hs, ss), (zt, ht, st) = outputs

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    return {
        "logits": float(-(softmax(zt) * np.log(softmax(zs))).sum(-1).mean()),
        "hidden": float(sum(((a - b) ** 2).mean() for a, b in zip(hs, ht, strict=True))),
        "attention": float(sum(((a - b) ** 2).mean() for a, b in zip(ss, st, strict=True))),
    }


@pytest.mark.parametrize("term", ["logits", "hidden", "attention"])
def test_each_loss_is_the_formula(
    architectures: dict[str, Architecture], intervene: Callable[..., Made], term: str
) -> None:
    _, student, teacher, batch = intervene(change=0.05)
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    for model in (student, teacher):
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            module.__dict__.pop("probe", None)
        model.set_attn_implementation("eager")
    expected = by_hand(student, teacher, batch)
    options = Distillation(**{**dict.fromkeys(expected, 0.0), term: 2.0})
    objective = DistillationLoss(options, lambda logits, batch: logits.sum())
    objective.attach(student, Scene(student, architectures["bert"], lambda: teacher))
    found = objective.loss(batch, 0.5)
    objective.detach()
    assert found.item() == pytest.approx(2 * expected[term], rel=1e-5)
    assert expected[term] > 1e-2


@pytest.mark.parametrize(("out_loss", "part"), [("post_ln", "LayerNorm"), ("pre_residual", "dense")])
def test_by_default_the_loss_is_the_sum_of_four_formulas(
    intervene: Callable[..., Made], out_loss: str, part: str
) -> None:
    """L_pred + L_AS + L_rep + L_out, each with weight 1 and no label; L_out from hooks on stock modules."""
    objective, student, teacher, batch = intervene(change=0.05, phase="finetune", out_loss=out_loss)
    found = objective.loss(batch, 0.0).item()
    objective.detach()
    outputs: list[list[Tensor]] = [[], []]
    for model, seen in zip((student, teacher), outputs, strict=True):
        for layer in model.bert.encoder.layer:
            module = layer.attention.output.get_submodule(part)
            module.register_forward_hook(
                lambda module, given, output, seen=seen: seen.append(output.double())
            )
    expected = by_hand(student, teacher, batch)
    assert len(outputs[0]) == len(outputs[1]) == 2
    between = [float((a - b).square().mean()) for a, b in zip(*outputs, strict=True)]
    assert found == pytest.approx(sum(expected.values()) + sum(between), rel=1e-5)
    assert sum(between) > 1e-3 * found


def test_the_prediction_of_each_kind_of_task_is_compared_in_its_own_way() -> None:
    said, taught = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])
    assert float(prediction_loss(said, taught, {}, 1.0, "regression")) == pytest.approx((0.25 + 25) / 2)
    sigmoid = 1 / (1 + np.exp(-np.array([0.5, 3.0])))
    p = 1 / (1 + np.exp(-np.array([1.0, -2.0])))
    both = -(sigmoid * np.log(p) + (1 - sigmoid) * np.log(1 - p)).sum()
    found = prediction_loss(said, taught, {}, 1.0, "multi_label_classification")
    assert float(found) == pytest.approx(both, rel=1e-5)
    hot = prediction_loss(said, taught, {}, 2.0, None)
    soft = F.softmax(taught / 2, -1)
    assert float(hot) == pytest.approx(4 * float(-(soft * F.log_softmax(said / 2, -1)).sum()), rel=1e-6)


def test_padding_tokens_do_not_count_in_a_taggers_prediction() -> None:
    said, taught = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = prediction_loss(said, taught, {"attention_mask": mask}, 1.0, None)
    kept = mask.bool()
    assert float(found) == pytest.approx(float(prediction_loss(said[kept], taught[kept], {}, 1.0, None)))


def test_masked_scores_count_as_0_whatever_a_mask_adds_to_them() -> None:
    """A mask of -10000 leaves differences between two models, which no probability shows."""
    said, taught = torch.tensor([[1.0, -9998.0, 5.0]]), torch.tensor([[3.0, -10001.0, 5.0]])
    assert float(scores_loss([said], [taught])) == pytest.approx((4 + 0 + 0) / 3)


def test_the_teacher_runs_once_for_each_batch(intervene: Callable[..., Made]) -> None:
    objective, _, teacher, batch = intervene()
    calls: list[int] = []
    teacher.register_forward_hook(lambda *arguments: calls.append(1))
    for _ in range(3):
        objective.loss(batch, 0.0)
    objective.loss(dict(batch), 0.0)
    assert len(calls) == 2


def test_nothing_is_left_on_the_model(intervene: Callable[..., Made]) -> None:
    objective, student, teacher, batch = intervene()
    objective.loss(batch, 0.0)
    objective.detach()
    for model in (student, teacher):
        assert model.config._attn_implementation == "eager"
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert not hasattr(module, "probe")


# When ------------------------------------------------------------------------------------------------


def test_gradual_is_output_context_attention_at_a_sixth_and_a_third() -> None:
    found = [mode_at("gradual", step / 60) for step in range(60)]
    assert found == ["output"] * 10 + ["context"] * 10 + ["attention"] * 40
    found = [mode_at("inverted", step / 60) for step in range(60)]
    assert found == ["attention"] * 20 + ["context"] * 20 + ["output"] * 20
    assert {mode_at("context", step / 60) for step in range(60)} == {"context"}


def test_stochastic_follows_the_seed_and_meets_every_mode() -> None:
    def draw(seed: int) -> list[str]:
        found = []
        for step in range(40):
            torch.manual_seed(1000 * seed + step)
            found.append(mode_at("stochastic", 0.5))
        return found

    assert draw(1) == draw(1) != draw(2)
    assert set(draw(1)) == set(MODES)


def test_the_two_steps_have_the_steps_of_the_recipe() -> None:
    phases = SCHEDULES["two-step"](TwoStep(), Train()).phases(None, ())
    assert [(phase.name, phase.steps) for phase in phases] == [("intervention", 60), ("finetune", 240)]
    train = Train.model_validate({"phases": {"intervention": {"steps": 7}}})
    phases = SCHEDULES["two-step"](TwoStep(), train).phases(None, ())
    assert [phase.steps for phase in phases] == [7, 240]


def test_a_run_of_60_and_4_updates_is_taught_10_10_40_and_then_not_at_all(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str | None] = []
    updates: list[torch.optim.Optimizer] = []
    replace = Watch.replace

    def spy(watch: Watch, mode: str | None, teacher: object) -> None:
        replace(watch, mode, teacher)
        if teacher is not None:  # it is also called to end a replacement
            modes.append(mode)

    monkeypatch.setattr(Watch, "replace", spy)
    handle = register_optimizer_step_post_hook(
        lambda optimizer, arguments, options: updates.append(optimizer)
    )
    source = save_encoder(tmp_path / "source", text_file, "bert")
    encoder_line(
        tmp_path / "line", source, text_file, "bert", method="teacher-intervention",
        format="ternary-a8", quantizer="ternary", schedule="two-step",
        train={"phases": {"intervention": {"steps": 60}, "finetune": {"steps": 4}}},
    ).train()  # fmt: skip
    handle.remove()
    assert modes == ["output"] * 10 + ["context"] * 10 + ["attention"] * 40 + [None] * 4
    assert len(updates) == 64
    assert len(set(updates[:60])) == 1 and set(updates[:60]).isdisjoint(updates[60:])


@pytest.mark.parametrize("mode", [*MODES, "gradual"])
def test_a_student_that_was_taught_folds_to_itself(text_file: Path, tmp_path: Path, mode: str) -> None:
    source = save_encoder(tmp_path / "source", text_file, "bert")
    made = encoder_line(
        tmp_path / "line", source, text_file, "bert", method="lsq", format="w8a8",
        objective={"name": "teacher-intervention", "mode": mode}, schedule="two-step",
        train={"phases": {"intervention": {"steps": 6}, "finetune": {"steps": 2}}},
    ).train().fold()  # fmt: skip
    inputs = token_inputs("bert", pad="right")
    assert torch.equal(made.logits("train", inputs), made.logits("fold", inputs))
    start = FAMILIES["bert"].load_float(source, made.float_model.path)
    tensors = dict(made.model("train").named_parameters())
    assert not torch.equal(tensors[INNER], start.get_parameter(INNER))


@pytest.mark.slow
def test_the_exported_graph_of_a_taught_student_is_the_student_without_its_teacher(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ternary, with rounded attention. Sums in another order flip a rounding here and there: most rows agree
    to 1e-5 of the range, as for every graph.
    """
    live: list[nn.Module] = []
    detach = Intervention.detach

    def keep(objective: Intervention) -> None:
        live.append(objective.student.model)
        detach(objective)

    monkeypatch.setattr(Intervention, "detach", keep)
    source = save_encoder(tmp_path / "source", text_file, "bert")
    made = encoder_line(
        tmp_path / "line", source, text_file, "bert", method="teacher-intervention", schedule="two-step",
        format={"preset": "ternary-a8", "attention": "int8"}, quantizer="ternary",
        train={"lr": {"weight": 1e-3}, "phases": {"intervention": {"steps": 6}, "finetune": {"steps": 2}}},
    ).train().fold()  # fmt: skip
    (tmp_path / "export").mkdir()
    export(
        made.folded, made.recipe.export, "rtx-ada", provenance(make_recipe(text_file)), tmp_path / "export"
    )
    inputs = token_inputs("bert", 24, 12, pad="right")
    with torch.no_grad():
        expected = live[0](**inputs).logits
    assert torch.equal(made.logits("train", inputs), expected)
    session = plain_session(tmp_path / "export" / "model.onnx")
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    far = np.abs(found - expected.numpy()).max(1) / np.ptp(expected.numpy())
    assert far.max() <= 0.1 and np.median(far) <= 1e-5
    assert float((made.logits("float", inputs) - expected).abs().max()) > 0.1
