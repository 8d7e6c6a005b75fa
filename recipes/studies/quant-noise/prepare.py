"""The bundled GPT-2 without its planted outliers: `python prepare.py FOLDER DATA`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "quickstart"))
from planting import bundled_without_outliers

bundled_without_outliers(Path(sys.argv[1]) / "plain")
