"""Writer of safetensors files that tells errors of the disk from errors of the tensors."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

OS_ERROR = re.compile(r"os error (\d+)")


def save_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. A full or read-only disk raises OSError, as for other files.

    safetensors reports the system's error inside its own exception's text.
    """
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        match = OS_ERROR.search(str(error))
        if match:
            code = int(match.group(1))
            raise OSError(code, os.strerror(code), str(file)) from None
        if "space" in str(error).lower():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None
        raise
