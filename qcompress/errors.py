"""Every error a user can meet, with its fix and the exit code of the command that met it.

    QcompressError            1   anything unexpected that we can still explain
    |- UsageError             2   the command line or an argument of the Python API
    |- RecipeError            2   one or more mistakes in a recipe, all reported together
    |- ModelError             2   a checkpoint that cannot be used as asked
    |- VerdictError         3/4   a run whose verdict forbids what was asked
    |- IncomparableError      4   runs that were not measured on the same thing, or not measured at all
    |- ExportError            5   export, lint or build refused the model
    |- MachineError           6   this machine lacks what the command requires (package, disk, device)
    |- BusyError              7   another live run holds the directory
    '- ContractError          1   a promise between two stages is broken: our bug, not the user's

The verdicts `regression` (3) and `anomalous` (4) are results, not errors: see `gate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


class QcompressError(Exception):
    """Base class. `fix` is one imperative sentence, or empty when there is nothing the user can do."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class UsageError(QcompressError):
    exit_code = 2


@dataclass(frozen=True)
class Mistake:
    """One mistake in a recipe: where it is, what was found, and what would be right."""

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
    exit_code = 2


class VerdictError(QcompressError):
    """`exit_code` is that of the verdict."""

    def __init__(self, message: str, *, fix: str = "", exit_code: int) -> None:
        super().__init__(message, fix=fix)
        self.exit_code = exit_code


class IncomparableError(QcompressError):
    exit_code = 4


class ExportError(QcompressError):
    exit_code = 5


class MachineError(QcompressError):
    exit_code = 6


def package_missing(error: ImportError, what: str) -> MachineError:
    """What to install where `what` ("this command", "this stage") needs a package that cannot be imported.
    An import of this package that fails is a defect of ours, and is raised again.
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
        fix=f"mend the installation: pip install --force-reinstall {name}",
    )


class BusyError(QcompressError):
    exit_code = 7


class ContractError(QcompressError):
    exit_code = 1
