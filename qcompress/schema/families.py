"""Model families by their names in a recipe; each is a module of `qcompress/models/`."""

from __future__ import annotations

from typing import Literal

Family = Literal[
    "gpt2", "bert", "roberta", "distilbert", "vit", "resnet", "cifar-resnet", "efficientnet", "mobilenet-v2",
    "decoder", "text-model", "image-model", "any-model",
]  # fmt: skip
"""`cifar-resnet` is the module `cifar_resnet`. Those that end in -model, and `decoder`, are any architecture:
their structure is discovered.
"""

DISCOVERED = {
    "causal-lm": "decoder",
    "feature-extraction": "text-model",
    "fill-mask": "text-model",
    "question-answering": "text-model",
    "sequence-classification": "text-model",
    "token-classification": "text-model",
    "image-classification": "image-model",
    "any": "any-model",
}
"""Task -> the family of a model without a stated one."""

MODEL_TYPES = {"mobilenet-v2": "mobilenet_v2"}
"""`model_type` of config.json, for families with another name."""


def model_type_of(family: str) -> str:
    """`model_type` of config.json of a family's checkpoints.

    >>> model_type_of("mobilenet-v2"), model_type_of("bert")
    ('mobilenet_v2', 'bert')
    """
    return MODEL_TYPES.get(family, family)


def family_of(model_type: str) -> str:
    """Name of the family whose checkpoints have this `model_type`; an unknown type is returned unchanged.

    >>> family_of("mobilenet_v2"), family_of("bert")
    ('mobilenet-v2', 'bert')
    """
    return next((family for family, named in MODEL_TYPES.items() if named == model_type), model_type)
