"""Methods of a user's own through the Python API: a quantizer, a stepper and an objective, from this file."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lines import ENVIRONMENT, NAME, Project, cli, make_project, values
from onnx import numpy_helper
from pydantic import Field
from torch import Tensor, nn

from qcompress import api
from qcompress.errors import RecipeError, UsageError
from qcompress.pipeline import keys
from qcompress.pipeline import run as pipeline
from qcompress.quant.affine import Grid, fake_quantize
from qcompress.quant.weight_quantizer import CodedWeight
from qcompress.recipe.load import load_recipe
from qcompress.schema.custom import among
from qcompress.schema.formats import Options
from qcompress.system.artifacts import read_json
from qcompress.training.methods.protocols import Group, Report


class PowerOfTwo(CodedWeight):
    """The smallest power of two that reaches the largest weight, times `factor`."""

    class Options(Options):
        factor: float = Field(default=1.0, gt=0)

    def __init__(self, options: Options, grid: Grid, bounds: tuple[int, int], shape: torch.Size) -> None:
        super().__init__()
        self.options, self.grid, self.bounds = options, grid, bounds

    def init(self, weight: Tensor) -> None:
        pass

    def scale_of(self, weight: Tensor) -> Tensor:
        largest = self.grid.largest(weight.detach())
        return self.options.factor * torch.exp2(torch.ceil(torch.log2(largest / self.bounds[1])))

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.grid.align(self.scale_of(weight)), self.bounds)

    def advance(self) -> None:
        pass


class SignStep:
    """Every trained number moves by its group's learning rate."""

    def __init__(self, options: Options) -> None:
        self.updates = 0

    def attach(self, model: nn.Module) -> None:
        pass

    def step(
        self, closure: Callable[[], Tensor], optimizer: Any, groups: Sequence[Group], taps: Any,
        accelerator: Any, moment: Any,
    ) -> Report:  # fmt: skip
        loss = closure()
        accelerator.backward(loss)
        with torch.no_grad():
            for group in groups:
                for parameter in group.parameters:
                    if parameter.grad is not None:
                        parameter.sub_(group.lr * parameter.grad.sign())
        optimizer.zero_grad()
        return Report(loss.item(), 1)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class HalfTheLoss:
    """The task's loss times a factor, by the model's logits."""

    class Options(Options):
        share: float = 0.5

    def __init__(self, options: Any, task_loss: Callable[[Tensor, Any], Tensor]) -> None:
        self.options, self.task_loss = options, task_loss

    def attach(self, student: nn.Module, scene: Any) -> None:
        self.student = student

    def begin(self, phase: str) -> None:
        pass

    def loss(self, batch: Any, progress: float) -> Tensor:
        logits = self.student(input_ids=batch["input_ids"]).logits
        return self.options.share * self.task_loss(logits, batch)

    def detach(self) -> None:
        self.student = None


class Unused:
    """An adapter that no recipe names."""

    def attach(self, prepared: Any, sites: Any, statistics: Any) -> None:
        raise NotImplementedError

    def fold(self) -> dict[str, Tensor]:
        raise NotImplementedError


OWN: dict[str, Any] = {
    "quantizers": {"power-of-two": PowerOfTwo},
    "steppers": {"sign": SignStep},
    "objectives": {"half": HalfTheLoss},
}

RECIPE: dict[str, Any] = {
    "method": "lsq",
    "quantizer": {"weights": "power-of-two"},
    "stepper": "sign",
    "objective": {"name": "half", "share": 0.25},
    "train": {"device": "cpu", "batch_size": 4, "phases": {"finetune": {"steps": 3}}},
}


@pytest.fixture(scope="module")
def project(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = make_project(tmp_path_factory.mktemp("own") / "project", tiny_model, text_file, **RECIPE)
    made.run(**OWN)
    return made


@pytest.mark.slow
def test_a_quantizer_of_ones_own_reaches_the_onnx_file(project: Project) -> None:
    """Every weight scale of the graph is a power of two, and none of the same run with lsq."""
    graph = onnx.load(project.latest / "model.onnx").graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    scales = [
        constants[node.input[1]].ravel()
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
        and constants[node.input[0]].ndim == 2 and constants[node.input[1]].ndim == 1
    ]  # fmt: skip
    powers = [bool(np.all(np.log2(each) % 1 == 0)) for each in scales]
    # the tables keep their min-max scales, which are powers of two by accident only
    assert sum(powers) >= 8 and powers.count(False) <= 2
    assert read_json(project.latest / "verdict.json")["verdict"] == "accept"


@pytest.mark.slow
def test_a_stepper_and_an_objective_of_ones_own_train(project: Project) -> None:
    assert api.load(project.latest).manifest["phases"][-1]["steps"] == 3
    whole = {**RECIPE["objective"], "share": 1.0}
    losses = {}
    for name, objective in (("part", RECIPE["objective"]), ("whole", whole)):
        run = project.run(f"objective={json.dumps(objective)}", "train.phases.finetune.steps=1", **OWN)
        losses[name] = api.load(run.path).manifest["phases"][-1]["last_loss"]
    assert losses["part"] == pytest.approx(losses["whole"] / 4, rel=1e-5)


def test_such_a_run_is_opened_and_judged_by_whoever_has_not_got_the_class(project: Project) -> None:
    assert read_json(project.latest / "manifest.json")["own"] == {
        "quantizer": ["power-of-two"], "objective": ["half"], "stepper": ["sign"],
    }  # fmt: skip
    loaded = api.load(project.latest)
    assert loaded.recipe.quantizer.weights.name == "power-of-two" and loaded.recipe.objective.share > 0
    assert cli("gate", "--candidate", project.latest).code == 0


def test_the_same_class_reuses_every_stage_and_another_source_does_not(project: Project) -> None:
    unused = {**OWN, "adapters": {"unused": Unused}}
    assert all(step.reused for step in project.run(**unused).steps)
    source = project.folder / "elsewhere.py"
    source.write_text("import test_own\n\n\nclass Same(test_own.SignStep):\n    pass\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(project.folder)
        import elsewhere

        again = project.run(**{**OWN, "steppers": {"sign": elsewhere.Same}}, until="train")
    assert not {step.stage: step.reused for step in again.steps}["train"]


def test_a_helper_in_another_file_and_a_base_in_this_package_are_in_the_key(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stepper derived from SAQ whose helper became 100 times as large was served from the cache."""
    for name, value in ENVIRONMENT.items():  # the number of threads is in the key
        monkeypatch.setenv(name, value)
    folder = project.folder / "lib"
    folder.mkdir()
    helper = folder / "own_helper.py"
    helper.write_text("def factor():\n    return 1\n")
    (folder / "own_saq.py").write_text(
        "from own_helper import factor\nfrom qcompress.training.methods.saq import SharpnessAwareUpdate\n"
        "from qcompress.schema.method_options import Saq\n\n\n"
        "class Mine(SharpnessAwareUpdate):\n    class Options(Saq):\n"
        "        rho: float = 0.05\n\n    def step(self, *given):\n        factor()\n"
        "        return super().step(*given)\n"
    )
    monkeypatch.syspath_prepend(folder)
    import own_saq

    overrides = ["stepper=own-saq"]
    classes = {**OWN, "steppers": {"own-saq": own_saq.Mine}}
    made = project.run(*overrides, until="train", **classes)
    assert "training/methods/saq.py" in made.steps[1].parts["code"]
    assert "training/methods/squat.py" not in made.steps[1].parts["code"]

    def train() -> tuple[str, bool, str]:
        by_axis = {f"{axis[:-1]}": classes_of_axis for axis, classes_of_axis in classes.items()}
        with among(by_axis):
            return pipeline.reuse(keys.prepare(load_recipe(project.recipe, overrides)), project.cache)[1]

    assert train() == ("train", True, "")
    helper.write_text("# a comment\ndef factor():\n    return 1\n")
    assert train() == ("train", True, "")
    helper.write_text("def factor():\n    return 100\n")
    with pytest.raises(UsageError, match="own_helper.py was changed after it was imported: factor"):
        train()
    importlib.reload(sys.modules["own_helper"])
    classes["steppers"] = {"own-saq": importlib.reload(own_saq).Mine}
    assert train() == ("train", False, "code: custom own_helper changed")


class Codes:
    """Half a quantizer of weights."""

    init = __call__ = advance = scale_of = codes_of = lambda self: None


def test_without_the_class_the_name_is_a_mistake_of_the_recipe(project: Project) -> None:
    with pytest.raises(RecipeError, match="power-of-two"):
        project.run()
    done = cli("check", project.recipe)
    assert done.code == 2 and "minmax, lsq, ternary" in done.stderr


def test_mistakes_in_its_options_are_found_like_all_others(project: Project) -> None:
    for wrong, message in (
        ({"name": "power-of-two", "factor": -1}, "must be above 0"),
        ({"name": "power-of-two", "fctor": 2}, "did you mean `factor`"),
    ):
        with pytest.raises(RecipeError) as raised:
            project.run(f"quantizer.weights={json.dumps(wrong)}", **OWN)
        assert message in str(raised.value)
    with pytest.raises(RecipeError, match="minmax, lsq, dynamic"):  # it is for weights
        project.run("quantizer.activations=power-of-two", **OWN)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"steppers": {"saq": SignStep}}, "stepper 'saq' is taken"),
        ({"steppers": {"Sign Step": SignStep}}, "not a valid name in a recipe"),
        ({"steppers": {"sign": SignStep(None)}}, "must be a class"),
        ({"steppers": {"sign": HalfTheLoss}}, r"has no step, state_dict, load_state_dict"),
        ({"quantizers": {"codes": Codes}}, r"and no parts, of_rows"),
        ({"objectives": {"half": type("Bad", (HalfTheLoss,), {"Options": dict})}}, "not a section of a"),
    ],
    ids=["taken", "name", "instance", "protocol", "weights", "options"],
)
def test_a_class_that_cannot_be_used_is_refused_before_anything_runs(
    classes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        api.run(tmp_path / "there-is-no-recipe.yaml", **classes)


def test_nothing_is_left_behind_even_by_a_call_that_fails(project: Project, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), among({"stepper": {"sign": SignStep}}):
        assert load_recipe(project.recipe, ["quantizer=lsq", "objective=task"]).recipe.stepper.name == "sign"
        raise ZeroDivisionError
    with pytest.raises(RecipeError, match="stepper"):
        load_recipe(project.recipe, ["quantizer=lsq", "objective=task"])
    assert values()["name"] == NAME
