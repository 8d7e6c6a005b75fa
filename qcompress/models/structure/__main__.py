"""Child process of `kept.py`: reads auto class and config from standard input, writes the structure or an
error to standard output.
"""

from __future__ import annotations

import json
import os
import sys

from qcompress.errors import QcompressError
from qcompress.models.structure.kept import discovered


def main() -> None:
    """Discover; whatever libraries print goes to standard error."""
    answer, sys.stdout = sys.stdout, sys.stderr
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        found = discovered(sys.stdin.read())
    except QcompressError as error:
        found = {"error": error.message, "fix": error.fix}
    json.dump(found, answer)


main()
