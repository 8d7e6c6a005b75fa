"""Models that a Python function of the user makes (`model.python: FILE:FUNCTION` of a recipe).

The function runs in a child process, which writes what other models have: config.json and model.safetensors.
config.json (`model_type` python) names the file, the function, and the digests of the file and of what it
imports beside itself; later stages call the function again and fill in their tensors. Such a config.json is
made here alone: a checkpoint with one is refused, so that no checkpoint runs code.

Torch is imported only inside functions that run the user's code.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import MachineError, ModelError
from qcompress.models.kept_folder import cache_folder
from qcompress.models.loading import complete, hashed_files
from qcompress.models.named_outputs import PYTHON
from qcompress.system.child_process import command, environment
from qcompress.system.digests import digest_of
from qcompress.system.user_code import executed, imports_beside

if TYPE_CHECKING:
    from torch import nn

    from qcompress.models.python_model import UserModule

DEFAULT = "make"
"""Function of a file that is named alone."""

IMAGES, ANY = "images", "any"
"""Kinds of modules: classifiers of images, and others."""

RETURNS = {
    IMAGES: "return (module, inputs): a torch.nn.Module in fp32, and an example of its input, a float tensor "
    "[batch, channels, height, width]",
    ANY: "return (module, inputs): a torch.nn.Module in fp32, and an example of its inputs, a tensor, a "
    "tuple of tensors, or a dict of tensors by the names of the arguments of `forward`, each [batch, ...]",
}
"""Return value of a function, by kind, as messages ask for it."""


def split(named: str) -> tuple[str, str]:
    """File and function of `model.python`.

    >>> split("net.py:tiny"), split("net.py")
    (('net.py', 'tiny'), ('net.py', 'make'))
    """
    file, colon, function = named.rpartition(":")
    return (file, function) if colon and function.isidentifier() else (named, DEFAULT)


def make_checkpoint(named: str, base: Path, kind: str = IMAGES) -> Path:
    """Directory with config.json and model.safetensors of the module that the function makes; the file is
    relative to `base`. Raises ModelError for a file or function that cannot be used.
    """
    file, function = split(named)
    path = (base / file).resolve()
    if not path.is_file():
        raise ModelError(
            f"model.python: {file} does not exist (looked for {path})",
            fix="write FILE:FUNCTION, with the file relative to the recipe",
        )
    return _made(path, function, kind)


def made_folder() -> Path:
    """Folder of the checkpoints that this module makes."""
    return cache_folder().parent / "python"


def _made(path: Path, function: str, kind: str) -> Path:
    """Make the checkpoint in a child process: its folder is named after its content."""
    folder = made_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as made,
        tempfile.TemporaryDirectory() as empty,
    ):
        arguments = command("qcompress.models.python_child", str(path), function, kind, made)
        child = subprocess.run(arguments, capture_output=True, text=True, cwd=empty, env=environment())
        if child.returncode:
            message, _, fix = child.stdout.strip().rpartition("\n")
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(
                message or f"model.python: {path} ended with code {child.returncode}: {last}", fix=fix
            )
        files = sorted(Path(made).iterdir())
        name = hashlib.sha256("".join(digest_of(file) for file in files).encode()).hexdigest()[:24]
        target = folder / name
        if not target.is_dir():
            with suppress(OSError):  # another process made the same one
                os.rename(made, target)
    if not target.is_dir():
        raise MachineError(f"{target} cannot be written", fix="check the disk and its permissions")
    return target


def refuse_code(directory: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for a checkpoint whose config.json asks to run Python code."""
    if PYTHON in config or config.get("model_type") == PYTHON:
        raise ModelError(
            f"{directory}: config.json asks to run Python code, which no checkpoint may",
            fix="name the file and its function in the recipe: `model: {python: FILE:FUNCTION}`",
        )


def module_of(config: dict[str, Any]) -> UserModule:
    """Make the module of such a config.json. Raises ModelError if a file was changed since."""
    made = config[PYTHON]
    for name, digest in made["files"].items():
        if not Path(name).is_file() or digest_of(Path(name)) != digest:
            raise ModelError(
                f"{name} was changed after the run had read it",
                fix="run the recipe again, which reads it anew",
            )
    module, _ = called(Path(made["file"]), made["function"], made.get("kind", IMAGES))
    return module


def filled_module(config: dict[str, Any], source: Path, directory: Path) -> UserModule:
    """The module with the weights of a checkpoint; `directory`: the load stage's folder."""
    from safetensors.torch import load_file

    module = module_of(config)
    tensors: dict[str, Any] = {}
    for file in hashed_files(source, directory):
        tensors |= load_file(file)
    module.load_state_dict(tensors, strict=False)
    complete(module, source, directory, own_values(module).keys() - tensors.keys())
    return module


def called(path: Path, function: str, kind: str) -> tuple[UserModule, dict[str, str]]:
    """Module that the function makes, and digests of the file and its imports, by path."""
    import torch
    from torch import nn

    from qcompress.models.python_model import AnyModule, ImageModule

    with ExitStack() as stack:
        imported = stack.enter_context(imports_beside(path.parent))
        stack.enter_context(torch.random.fork_rng(devices=()))
        stack.enter_context(torch.inference_mode(False))  # the function may train, whoever calls it
        stack.enter_context(torch.enable_grad())
        maker = getattr(executed(path), function, None)
        if not callable(maker):
            raise ModelError(f"model.python: {path} has no function {function}", fix=f"define `{function}()`")
        made = maker()
        files = {str(file): digest_of(file) for file in (path, *imported())}
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    example = _example(module, inputs) if isinstance(module, nn.Module) else {}
    is_image = len(example) == 1 and all(x.dim() == 4 and x.is_floating_point() for x in example.values())
    if not (is_image if kind == IMAGES else example):
        parts = made if isinstance(made, tuple) else (made,)
        said = ", ".join(type(part).__name__ for part in parts)
        raise ModelError(f"model.python: {function} of {path.name} returned {said:.80}", fix=RETURNS[kind])
    other = next((name for name, one in module.named_parameters() if one.dtype != torch.float32), None)
    if other is not None:
        raise ModelError(
            f"model.python: the parameter {other} is {module.get_parameter(other).dtype}, and must be fp32",
            fix="return `module.float()`",
        )
    return (ImageModule if kind == IMAGES else AnyModule)(module.eval(), example), files


def _example(module: nn.Module, inputs: Any) -> dict[str, Any]:
    """Example inputs by the names of the forward's arguments; empty for anything else than tensors."""
    import torch

    if not isinstance(inputs, dict):
        given = inputs if isinstance(inputs, list | tuple) else (inputs,)
        places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        known = inspect.signature(module.forward).parameters.values()
        names = [one.name for one in known if one.kind in places]
        inputs = dict(zip(names, given, strict=False)) if len(given) <= len(names) else {}
    return inputs if all(isinstance(one, torch.Tensor) and one.dim() for one in inputs.values()) else {}


def own_values(module: Any) -> dict[str, Any]:
    """Parameters and persistent buffers by name, shared ones once."""
    kept = set(module.state_dict().keys())
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value for name, value in named if name in kept}
