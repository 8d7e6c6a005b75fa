"""Recipe files that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from attacked import attacked, refused

pytestmark = pytest.mark.attack("recipes that are not readable files")


@pytest.mark.parametrize("what", ["missing", "folder", "binary", "empty"])
def test_a_recipe_that_cannot_be_read_is_refused(what: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    if what == "folder":
        recipe.mkdir()
    elif what != "missing":
        recipe.write_bytes(os.urandom(300) if what == "binary" else b"")
    refused(attacked("check", recipe), 2, "recipe.yaml")
