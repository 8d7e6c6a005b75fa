"""Errors shown to users, each with a fix and the exit code of the command.

    QcompressError            1   an unexpected error with an explanation
    |- UsageError             2   the command line or an argument of the Python API
    |- RecipeError            2   one or more mistakes in a recipe, all reported together
    |- ModelError             2   a checkpoint that cannot be used as asked
    |- VerdictError         3/4   a run whose verdict forbids the requested action
    |- IncomparableError      4   runs that were not measured on the same samples, or not measured
    |- ExportError            5   export, lint or build refused the model
    |- MachineError           6   this machine lacks what the command requires (package, disk, device)
    |- BusyError              7   another live run holds the directory
    '- ContractError          1   a contract between two stages is broken: a bug of qcompress

The verdicts `regression` (3) and `anomalous` (4) are results, not errors: see `verdict/judge.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


class QcompressError(Exception):
    """Base class. `fix` is one imperative sentence, or empty if the user cannot fix the error."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class UsageError(QcompressError):
    """The command line or an argument of the Python API is wrong."""

    exit_code = 2


@dataclass(frozen=True)
class Mistake:
    """One mistake in a recipe: place, message with the value found, and fix."""

    file: str
    line: int
    key: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.line else f"{self.file}: "
        return f"{where}{self.key}: {self.message}" + (f" (fix: {self.fix})" if self.fix else "")


class RecipeError(QcompressError):
    """All mistakes of one recipe, in the order of the file."""

    exit_code = 2

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = sorted(mistakes, key=lambda mistake: (mistake.file, mistake.line, mistake.key))
        count = f"{len(mistakes)} mistake{'s' if len(mistakes) != 1 else ''}"
        super().__init__(
            "\n".join([f"the recipe has {count}:", *(f"  {mistake}" for mistake in self.mistakes)])
        )


class ModelError(QcompressError):
    """A checkpoint cannot be used as asked."""

    exit_code = 2


class VerdictError(QcompressError):
    """A verdict forbids the action. `exit_code` is that of the verdict."""

    def __init__(self, message: str, *, fix: str = "", exit_code: int) -> None:
        super().__init__(message, fix=fix)
        self.exit_code = exit_code


class IncomparableError(QcompressError):
    """Runs were not measured on the same samples, or not measured."""

    exit_code = 4


class ExportError(QcompressError):
    """Export, lint or build refused the model."""

    exit_code = 5


class MachineError(QcompressError):
    """This machine lacks a requirement of the command (package, disk, device)."""

    exit_code = 6


def package_missing(error: ImportError, what: str) -> MachineError:
    """MachineError with the install command of a package that `what` ("this command", "this stage") cannot
    import. A failing import of qcompress itself is a bug and is raised again.
    """
    name = (error.name or "").partition(".")[0]
    if not name or name == "qcompress":
        raise error
    extra = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}.get(name, "train")
    if isinstance(error, ModuleNotFoundError):
        return MachineError(
            f"{what} needs the package {name}, which is not installed",
            fix=f"pip install 'qcompress[{extra}]'",
        )
    return MachineError(
        f"{what} needs the package {name}, which cannot be imported ({error})",
        fix=f"repair the installation: pip install --force-reinstall {name}",
    )


class BusyError(QcompressError):
    """Another live run holds the directory."""

    exit_code = 7


class ContractError(QcompressError):
    """A contract between two stages is broken: a bug of qcompress."""

    exit_code = 1
