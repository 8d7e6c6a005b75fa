"""The types that a model computes in, by the words of a recipe."""

from __future__ import annotations

import torch

COMPUTE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""`format.compute`: everything that is no integer, and the scales."""
