"""Reader of `gate --goals FILE`: a YAML file with a recipe's `gate` section. No torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from qcompress.errors import UsageError
from qcompress.recipe.load import read
from qcompress.schema.goals import Gate


def read_goals(file: Path) -> Gate:
    """Read the goals from a YAML file whose only key is `gate`. Raises UsageError with the invalid key."""
    if not file.is_file():
        raise UsageError(f"{file} does not exist", fix="name a YAML file with a section `gate`")
    document = read(file)
    if document.mistakes:
        raise UsageError("\n".join(map(str, document.mistakes)))
    value = document.value
    if not isinstance(value, dict) or set(value) != {"gate"}:
        keys = ", ".join(map(str, value)) if isinstance(value, dict) and value else "nothing"
        raise UsageError(
            f"{file} has {keys}, and not the one key `gate`", fix="write the goals under `gate:`"
        )
    try:
        return Gate.model_validate(value["gate"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["gate", *map(str, first["loc"])])
        raise UsageError(f"{file}: {where}: {first['msg']}") from None
