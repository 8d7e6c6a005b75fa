"""Compress a model with quantization-aware training, export it to TensorRT, prove it is the same model.

- `run`: run a recipe, from the float model to a verdict
- `load`: open a finished run
- `verify`: measure a run again, or import a device's measurement
- `gate`: judge a run by its recipe's goals
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["gate", "load", "run", "verify"]

if TYPE_CHECKING:
    from qcompress.api import gate, load, run, verify


def __getattr__(name: str) -> object:
    # lazily, so that `import qcompress` costs nothing until the API is used
    if name in __all__:
        from qcompress import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
