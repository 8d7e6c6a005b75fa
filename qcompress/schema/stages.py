"""Names of the stages and of the ladder's rows. No torch, and no pydantic: `--help` shows them."""

from __future__ import annotations

from typing import Literal

Stage = Literal["load", "train", "fold", "export", "build", "verify", "gate"]
STAGES: tuple[str, ...] = ("load", "train", "fold", "export", "build", "verify", "gate")

Row = Literal["float", "trained", "folded", "onnx", "engine"]
ROWS: tuple[str, ...] = ("float", "trained", "folded", "onnx", "engine")
