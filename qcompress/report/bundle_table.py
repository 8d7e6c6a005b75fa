"""Terminal tables of a bundle, of this machine, and of the checks of a bundle on this machine. No torch."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console

from qcompress.system.screen import Cells


def print_bundle(console: Console, record: dict[str, Any], folder: str) -> None:
    """Print the inputs and outputs of a new bundle, its batching and its files."""
    table = Cells(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    for column in ("", "name", "type", "axes"):
        table.add_column(column)
    for side in ("inputs", "outputs"):
        for item in record[side]:
            axes = ", ".join("?" if axis is None else str(axis) for axis in item["axes"])
            table.add_row(side[:-1], item["name"], item["type"], f"[{axes}]")
    console.print(table)
    batch = record["max_batch_size"]
    batches = f"batches of at most {batch}" if batch else "no batching"
    console.print(f"{batches}, {record['warmup']} for warm-up, {len(record['files'])} files")
    last = f"{record['verdict']}  {record['name']}  {record['backend']}  {folder}"
    console.print(last, soft_wrap=True)


def print_examined(console: Console, examination: dict[str, Any]) -> None:
    """Print each fault of a bundle with its fix, then whether the bundle would load."""
    for fault in examination["faults"]:
        kind = "broken" if fault["broken"] else "lacking"
        console.print(f"{kind}: {fault['what']}\n  fix: {fault['fix']}", soft_wrap=True)
    for note in examination["notes"]:
        console.print(f"note: {note}", style="dim", soft_wrap=True)
    last = "would load" if examination["loads"] else "would not load"
    console.print(f"{last}  {examination['bundle']}", soft_wrap=True)


def print_machine(console: Console, machine: dict[str, Any]) -> None:
    """Print what each job needs and whether it is installed, the fixes, GPUs, disk and Python."""
    table = Cells(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    for column in ("job", "takes", "wanted", "found", ""):
        table.add_column(column, overflow="fold")
    fixes: dict[str, list[str]] = {}
    for job in machine["jobs"]:
        for place, need in enumerate(job["needs"]):
            first = (f"{job['job']}", "ready" if job["ready"] else "lacking")[: 1 if place else 2]
            name = f"{first[0]}  ({first[1]})" if not place else ""
            state = "ok" if need["ok"] else "missing" if need["found"] is None else "not this one"
            table.add_row(name, need["what"], need["wanted"], need["found"] or "-", state)
            if not need["ok"]:
                jobs = fixes.setdefault(need["fix"], [])
                jobs += [job["job"]] if job["job"] not in jobs else []
    console.print(table)
    for fix, jobs in fixes.items():
        console.print(f"{', '.join(jobs)}:\n  {fix}", soft_wrap=True)
    gpus = [f"{gpu['name']}, driver {gpu['driver']}, compute capability {gpu['compute_capability']}"
            for gpu in machine["gpus"]]  # fmt: skip
    console.print(f"GPU: {'; '.join(gpus) or machine['gpu_reason']}", soft_wrap=True)
    console.print(f"disk: {machine['disk']['free_gib']} GiB free in {machine['disk']['folder']}",
                  soft_wrap=True)  # fmt: skip
    python = machine["python"]
    last = f"qcompress {machine['qcompress']}, Python {python['version']} ({python['executable']})"
    console.print(last, soft_wrap=True)
