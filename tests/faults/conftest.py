"""The table of docs/reliability.md, made of the results of the fault suite.

    make faults      every attack, the slow ones too, and the table

A test names its row with `@pytest.mark.attack("...")` (or `pytestmark` for a whole file). Each test item
counts as one try; a test that tries several inputs itself says how many with the fixture `tried`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_bert import save_encoder
from tiny_nets import save_net
from tiny_vit import save_vit

from qcompress.verdict.run_files import check_files

BEGIN, END = "<!-- table: make faults -->", "<!-- end of the table -->"


@dataclass
class Row:
    """One row of the table."""

    tries: int = 0
    failures: int = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="Markdown file whose table is replaced by this run's.")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and children inherit that
    if file := config.getoption("--reliability"):
        config.pluginmanager.register(Table(file), "reliability-table")


@pytest.fixture(autouse=True)
def _row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Every test of this folder belongs to a row."""
    mark = request.node.get_closest_marker("attack")
    assert mark is not None, f"{request.node.nodeid} names no attack"
    record_property("attack", mark.args[0])


@pytest.fixture(autouse=True)
def _trusts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere tests edit runs by hand, and digests are not looked at."""
    monkeypatch.setattr("qcompress.verdict.run_directory.check_files", check_files)


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path
) -> dict[str, Path]:
    """A checkpoint of each family. Read only: copy it before changing it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {"gpt2": tiny_model, "vit": save_vit(folder / "vit")}
    nets = {
        "resnet": "basic", "efficientnet": "efficientnet", "cifar-resnet": "cifar",
        "mobilenet-v2": "mobilenet",
    }  # fmt: skip
    made |= {family: save_net(folder / family, kind) for family, kind in nets.items()}
    texts = ("bert", "roberta", "distilbert")
    return made | {family: save_encoder(folder / family, text_file, family) for family in texts}


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Says how many inputs a test tries, where it is more than one."""
    return lambda count: record_property("tries", count)


def _read(table: str) -> dict[str, Row]:
    """Rows of the table as it was: those that this session did not run stay."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name: Row(int(tries), int(failures)) for name, tries, failures in cells if tries.isdigit()}


class Table:
    """Counts the results and writes the table at the end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, Row] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A failure in set-up or tear-down is a failure of the test."""
        properties = dict(report.user_properties)
        if "attack" not in properties or report.skipped:
            return
        row = self.rows.setdefault(str(properties["attack"]), Row())
        row.tries += int(properties.get("tries", 1)) if report.when == "call" else 0
        row.failures += report.failed

    def pytest_sessionfinish(self) -> None:
        if not self.rows:  # a worker of xdist, whose controller has the results
            return
        before, _, rest = self.file.read_text(encoding="utf-8").partition(BEGIN)
        old, _, after = rest.partition(END)
        self.rows = {**_read(old), **self.rows}
        lines = ["| Attack | Tries | Failures |", "|---|---|---|"]
        lines += [f"| {name} | {row.tries} | {row.failures} |" for name, row in sorted(self.rows.items())]
        tries = sum(row.tries for row in self.rows.values())
        failures = sum(row.failures for row in self.rows.values())
        lines.append(f"| **all** | **{tries}** | **{failures}** |")
        text = "\n".join([before + BEGIN, "", *lines, "", END + after])
        self.file.write_text(text, encoding="utf-8")
