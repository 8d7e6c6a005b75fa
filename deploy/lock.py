"""Writes the hashed requirements of CI and of the container from constraints.txt, by pip's own report.

    python3.11 deploy/lock.py        on Linux x86-64, with the package index that is to be trusted

    deploy/requirements.txt          qcompress[all] on Python 3.11, Linux x86-64
    deploy/requirements-base.txt     qcompress alone and what builds it, Python 3.11 to 3.13, x86-64 and arm64

`pip install --require-hashes -r FILE` takes no other file than those. Standard library only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
CONSTRAINTS = PROJECT / "constraints.txt"

PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "linux")

Hashes = dict[tuple[str, str], set[str]]
"""By name and version."""


def resolve(requirements: list[str], *options: str) -> Hashes:
    """What pip would install: sha256 of each file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-c", str(CONSTRAINTS), *options, *requirements]
        subprocess.run(command, check=True)
        found: Hashes = {}
        for item in json.loads(report.read_text(encoding="utf-8"))["install"]:
            hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
            name = item["metadata"]["name"], item["metadata"]["version"]
            found[name] = {hashes["sha256"]}
        return found


def merged(many: list[Hashes]) -> Hashes:
    """One list of several platforms. A package of two versions is an error: no file could have both."""
    found: Hashes = {}
    for one in many:
        for key, hashes in one.items():
            found.setdefault(key, set()).update(hashes)
    names = [name.lower() for name, _ in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"two versions of {', '.join(sorted(twice))}: pin them in {CONSTRAINTS.name}")
    return found


def write(file: Path, what: str, found: Hashes) -> None:
    lines = [f"# {what}", "# Made by deploy/lock.py from constraints.txt: pip install --require-hashes -r"]
    for (name, version), hashes in sorted(found.items(), key=lambda item: item[0][0].lower()):
        lines.append(
            " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{h}" for h in sorted(hashes))])
        )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file}: {len(found)} packages")


def main() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    base = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    extras = project["project"]["optional-dependencies"]
    everything = [*base, *extras["train"], *extras["rtx"]]
    write(HERE / "requirements.txt", "qcompress[all], Python 3.11, Linux x86-64", resolve(everything))
    platforms = []
    for python in PYTHONS:
        for machine in MACHINES:
            options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
            options += ["--target", tempfile.gettempdir()]
            for glibc in GLIBC:
                options += ["--platform", f"{glibc}_{machine}"]
            platforms.append(resolve(base, *options))
    what = (
        f"qcompress and what builds it, Python {PYTHONS[0]} to {PYTHONS[-1]}, Linux {' and '.join(MACHINES)}"
    )
    write(HERE / "requirements-base.txt", what, merged(platforms))


if __name__ == "__main__":
    main()
