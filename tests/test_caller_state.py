"""A run leaves its process as it was: generators, settings, warnings, logging, environment and accelerate.

The runs happen in a child process, whose state no other test has touched. Packages that set warnings filters,
levels of loggers and an environment variable when they are first imported are imported before: scipy, sympy,
rich, torch.distributed and what torch's exporter imports.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lines import ENVIRONMENT, make_project, python

SCRIPT = """
import json, locale, logging, os, random, resource, signal, sys, warnings

import numpy as np
import onnxruntime
import rich.style
import scipy.stats
import sympy
import torch
import torch.distributed.checkpoint
import torch.distributed.run
from accelerate import Accelerator
from transformers import logging as transformers_logging

import qcompress
from qcompress.errors import ModelError


class Failing:
    # an objective that fails in the middle of training

    def __init__(self, options, task_loss):
        self.calls = 0

    def attach(self, student, scene):
        self.student = student

    def begin(self, phase):
        pass

    def loss(self, batch, progress):
        self.calls += 1
        if self.calls == 3:
            raise ModelError("the third loss fails")
        return self.student(input_ids=batch["input_ids"]).logits.square().mean()

    def detach(self):
        pass


def state():
    loggers = {name: logger.level for name, logger in logging.root.manager.loggerDict.items()
               if isinstance(logger, logging.Logger) and logger.level}
    return {
        "torch's generator": torch.get_rng_state().tolist(),
        "numpy's generator": [str(part) for part in np.random.get_state()],
        "python's generator": str(random.getstate()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), str(torch.get_autocast_dtype("cpu"))),
        "deterministic": (torch.are_deterministic_algorithms_enabled(),
                          torch.is_deterministic_algorithms_warn_only_enabled(),
                          torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
                      torch.backends.mkldnn.enabled, torch.is_anomaly_enabled()),
        "numpy's errors": np.geterr(),
        "warnings": [str(entry) for entry in warnings.filters],
        "logging": (logging.root.level, [str(handler) for handler in logging.root.handlers],
                    logging.root.manager.disable),
        "levels of loggers": loggers,
        "transformers": (transformers_logging.get_verbosity(),
                         transformers_logging.is_progress_bar_enabled()),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": {int(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
        "limits": {name: resource.getrlimit(getattr(resource, name))
                   for name in dir(resource) if name.startswith("RLIMIT_")},
        "locale": locale.setlocale(locale.LC_ALL),
        "path": list(sys.path),
        "streams": (id(sys.stdout), id(sys.stderr), id(sys.excepthook), id(warnings.showwarning)),
        "accelerator": (mine.mixed_precision, str(mine.device), mine.gradient_accumulation_steps,
                        mine.sync_gradients, mine.num_processes, mine.state.initialized),
    }


def after(before):
    now = state()
    return [name for name in before if json.dumps(now[name]) != json.dumps(before[name])]


recipe, out = sys.argv[1:]
torch.onnx.export(torch.nn.Linear(2, 2).eval(), (torch.ones(1, 2),), dynamo=True, verbose=False)
transformers_logging.enable_progress_bar()
mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
torch.manual_seed(11), np.random.seed(12), random.seed(13)
torch.rand(3), np.random.rand(3)
before = state()
run = qcompress.run(recipe, out, until="export")
result = {"trained": [step.stage for step in run.steps], "after a run": after(before)}
try:
    qcompress.run(recipe, out, overrides=["objective=failing"], objectives={"failing": Failing})
except ModelError as error:
    result["error"] = str(error)
result["after an error"] = after(before)

model = torch.nn.Linear(3, 1)
model, optimizer = mine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
weight = model.weight.detach().clone()
moved = []
for _ in range(4):
    with mine.accumulate(model):
        mine.backward(model(torch.ones(2, 3)).sum())
        optimizer.step()
        optimizer.zero_grad()
    moved.append(not torch.equal(model.weight, weight))
result["moved"], result["type"] = moved, str(model(torch.ones(2, 3)).dtype)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("caller")
    project = make_project(folder / "project", tiny_model, text_file)
    done = python(SCRIPT, str(project.recipe), str(project.out), folder=folder, **ENVIRONMENT)
    assert done.code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_with_training_changes_nothing_of_its_process(result: dict) -> None:
    assert "train" in result["trained"] and result["after a run"] == []


def test_a_run_that_ends_with_an_error_changes_nothing_either(result: dict) -> None:
    assert "the third loss fails" in result["error"] and result["after an error"] == []


def test_an_accelerator_of_the_caller_works_as_before(result: dict) -> None:
    """bf16, and one step of the optimizer for four backward passes."""
    assert result["moved"] == [False, False, False, True]
    assert result["type"] == "torch.float32"
