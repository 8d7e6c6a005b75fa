"""Software bill of materials of a bundle, as CycloneDX 1.6: the model, its files, and the packages that made
it.

The document is a function of the run: it has no serial number and no time, so that two bundles of one run are
equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qcompress
from qcompress.system.artifacts import read_object, sha256_file
from qcompress.verdict.run_directory import LoadedRun

NAME = "sbom.cdx.json"


def bill_of_materials(run: LoadedRun, name: str, folder: Path) -> dict[str, Any]:
    """Bill of materials of the bundle in `folder`, whose files exist already; `name` is the model's."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": run.path.resolve().name,
        "properties": [
            {"name": "qcompress:recipe", "value": run.recipe.name},
            {"name": "qcompress:target", "value": run.recipe.build.target},
        ],
        "components": [_file(file, file.relative_to(folder).as_posix()) for file in files],
    }
    made_of = [
        _library(package, version)
        for package, version in sorted(run.manifest.get("versions", {}).items())
        if version and package != "qcompress"
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": model,
            "tools": {"components": [_library("qcompress", qcompress.__version__)]},
        },
        "components": [*_inputs(run), *made_of],
    }


def _file(file: Path, name: str) -> dict[str, Any]:
    return _hashed(name, sha256_file(file), f"file:{name}")


def _hashed(name: str, sha256: str, reference: str) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": sha256}]
    return {"type": "file", "bom-ref": reference, "name": name, "hashes": hashes}


def _library(name: str, version: str) -> dict[str, Any]:
    # https://github.com/package-url/purl-spec: names of Python packages are lower case with hyphens
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version.replace('+', '%2B')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _inputs(run: LoadedRun) -> list[dict[str, Any]]:
    """The recipe, and the float checkpoint's files if the load stage is still in the cache."""
    recipe = "recipe.resolved.yaml"
    components = [_file(run.path / recipe, recipe)]
    load = run.checked_stage("load")
    if load is not None and (load / "float.json").is_file():
        digests = read_object(load / "float.json").get("files", {})
        components += [
            _hashed(name, digest, f"checkpoint:{name}") for name, digest in sorted(digests.items())
        ]
    return components
