"""Compilation of the trained model by torch.compile, for recipes with `train: {compile: true}`.

Compiled are the forward and backward passes of the model, or of one block in a block-wise phase, where they
compute a loss. The loss itself, the optimizer, calibration, the teacher and every evaluation run uncompiled.
The compiled form is a second handle on the module: its parameters, their names and the checkpoints stay those
of the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qcompress.errors import MachineError
from qcompress.schema.recipe import Train

COMPILER: dict[str, Any] = {"backend": "inductor", "options": {"fallback_random": True}}
"""Arguments of torch.compile. With `fallback_random` dropout draws the numbers of the uncompiled model."""


def compiled(module: nn.Module, train: Train) -> nn.Module:
    """The compiled form of a module; without `train.compile` the module itself."""
    return torch.compile(module, **COMPILER) if train.compile else module


def require_compiler(train: Train, device: torch.device) -> None:
    """Compile one addition, so that a missing compiler shows before anything expensive starts. No-op without
    `train.compile`.

    Raises MachineError with the compiler's message.
    """
    if not train.compile:
        return
    try:
        torch.compile(lambda x: x + 1, **COMPILER)(torch.zeros(2, device=device))
    except RuntimeError as error:
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler such as g++"
        raise MachineError(
            f"train.compile is true, and torch.compile does not work on the device {device.type}: "
            f"{str(error).strip().splitlines()[0]}",
            fix=f"install {needed}, or write `train: {{compile: false}}`",
        ) from error
