"""Any module that a Python function of the user makes, with any inputs and outputs: structure discovered.

Every input and output has the batch as its first axis; the other axes are fixed, as in the function's
example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcompress.models.architecture import Head, Input
from qcompress.models.auto_family import AutoFamily
from qcompress.models.named_outputs import inputs_in
from qcompress.models.python_source import ANY

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qcompress.models.layer_selection import Tensors


class _AnyFamily(AutoFamily):
    """Modules of the user."""

    def task_config(self, config: dict[str, Any], tensors: Tensors, head: Head) -> dict[str, Any]:
        """The module's own config.json: it has no labels."""
        self._check_task(config, head)
        return config

    def signature(self, config: dict[str, Any]) -> tuple[Input, ...]:
        """Inputs of the exported graph, as in the example."""
        return tuple(
            Input(name, ("batch", *shape), element) for name, (shape, element) in inputs_in(config).items()
        )

    def _ready(self, model: nn.Module, config: dict[str, Any]) -> nn.Module:
        return model.eval()


MODULES = _AnyFamily(family="any-model", autos={"any": ANY}, inputs=())

TASKS, INPUTS = tuple(MODULES.autos), MODULES.inputs

DEPTH = None
"""Blocks have several shapes: `model.blocks` and layer drop do not apply."""

CAUSAL = False

describe, task_config, signature = MODULES.describe, MODULES.task_config, MODULES.signature
load_float, empty, tie = MODULES.load_float, MODULES.empty, MODULES.tie
install_points, shorten, prefix = MODULES.install_points, MODULES.shorten, MODULES.prefix


def graph_inputs(**inputs: Tensor) -> dict[str, Tensor]:
    """Inputs of the exported graph: all that are given."""
    return inputs
