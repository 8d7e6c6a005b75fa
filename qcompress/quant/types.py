"""Compute types of a model, by their names in a recipe."""

from __future__ import annotations

import torch

COMPUTE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""`format.compute`: the type of scales and of all values that are not integers."""
