"""Relative movement of learned scales during training, as a log line."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.models.prepare import Prepared
from qcompress.quant.learned_scale import LearnedScale


def movements(prepared: Prepared) -> dict[str, Tensor]:
    """Relative change of every learned scale since its initial value, [scales], for `weight` and
    `activation`.
    """
    quantizers = {
        "weight": [part for _, part in prepared.weight_quantizers()],
        "activation": [part for _, part in prepared.activation_quantizers()],
    }
    moved = {
        role: [part.movement().flatten() for part in parts if isinstance(part, LearnedScale)]
        for role, parts in quantizers.items()
    }
    return {role: torch.cat(parts) for role, parts in moved.items() if parts}


def movement_note(prepared: Prepared) -> str | None:
    """Summary line of scale movement for the log; None without learned scales."""
    parts = [
        f"{len(moved)} {role} scales by {100 * moved.median():.2g} % (median) and {100 * moved.max():.2g} % "
        "(largest)"
        for role, moved in movements(prepared).items()
    ]
    return f"learned scales moved: {', '.join(parts)}" if parts else None
