"""Model families by their names in a recipe; each is a module of `qcompress/models/`."""

from __future__ import annotations

from typing import Literal

Family = Literal["gpt2", "bert", "roberta", "distilbert", "vit", "resnet", "cifar-resnet", "efficientnet"]
"""`cifar-resnet` is the module `cifar_resnet`."""
