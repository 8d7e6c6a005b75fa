"""The bundled GPT-2 without its planted outliers, in FOLDER/plain: `python plain.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from planting import bundled_without_outliers

bundled_without_outliers(Path(sys.argv[1]) / "plain")
