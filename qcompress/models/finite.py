"""Check of a float model for NaN, infinity and negative variances."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 3
"""Number of tensors in a message."""


def demand_finite(model: nn.Module, source: Path) -> None:
    """Raise ModelError if a parameter or a statistic of a loaded model is not finite, or a variance is
    negative. Checkpoint tensors of other heads, which the model does not have, are not checked.
    """
    import torch

    from qcompress.quant.batchnorm import BATCH_NORMS

    broken = [
        (name, tensor, ~tensor.isfinite())
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    variances = {
        f"{name}.running_var": norm.running_var
        for name, norm in model.named_modules()
        if isinstance(norm, BATCH_NORMS) and norm.running_var is not None
    }
    broken += [(name, tensor, tensor < 0) for name, tensor in variances.items() if bool((tensor < 0).any())]
    if broken:
        more = f", and {len(broken) - SHOWN} more tensors" if len(broken) > SHOWN else ""
        places = "; ".join(_place(*item) for item in broken[:SHOWN])
        raise ModelError(
            f"{source}: the checkpoint holds values that no model can compute with: {places}{more}",
            fix="take a checkpoint from before training diverged, or one that was not saved in a type too "
            "small for its values (fp16 ends at 65504)",
        )


def _place(name: str, tensor: Tensor, wrong: Tensor) -> str:
    """Description of one tensor: number of wrong values, and index of the first."""
    first = wrong.nonzero()[0].tolist()
    count = int(wrong.sum())
    return f"{name} has {count} of {tensor.numel()}, the first at {first} ({float(tensor[tuple(first)]):g})"
