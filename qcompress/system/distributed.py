"""Distributed training: processes that train one model, started by torchrun or `accelerate launch`.

Every process runs one command. The first process does the work of all stages and owns the run's files; the
others join it in `train` and otherwise wait. Each process gets a share of every batch, and gradients are
averaged before clipping, so that N processes make the updates of one. FSDP is refused: it splits tensors
between processes, and the scale of a split weight cannot be learned.

Torch is imported only if there are several processes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from qcompress.errors import MachineError

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=7)
"""Longest wait for the first process, which may be measuring for hours."""

HOW = "start with `torchrun --nproc_per_node N -m qcompress run ...` or `accelerate launch --multi_gpu`"


@dataclass(frozen=True)
class Processes:
    """Rank of this process and number of processes that train together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """True for the process that owns the run's files."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """Rows of a batch for this process; every process gets equally many."""
        return list(rows[self.rank :: self.size])

    def agree(self, value: Any) -> Any:
        """Value of the first process, in every process."""
        if self.size == 1:
            return value
        import torch.distributed as distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first process's values to every process."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as distributed

        with torch.no_grad():
            for tensor in tensors:
                held = tensor.detach().contiguous()
                distributed.broadcast(held, src=0)
                tensor.copy_(held)


def announced() -> int:
    """Number of processes announced by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(cpu: bool) -> Processes:
    """Join the processes that the launcher started; a single process without a launcher.

    Raises MachineError if the launcher's settings are inconsistent.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise MachineError(
            "FSDP splits weights between processes, and a learned scale needs its whole tensor",
            fix=f"{HOW}, without FSDP",
        )
    size = announced()
    if size == 1:
        if "MASTER_PORT" in os.environ and "RANK" not in os.environ:
            raise MachineError(
                "the launcher announced several processes (MASTER_PORT is set) and started this one alone, "
                "as `accelerate launch --cpu` does",
                fix=HOW,
            )
        return Processes()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise MachineError(
            f"WORLD_SIZE says {size} processes, and {', '.join(missing)} is not set: they could not meet",
            fix=HOW,
        )
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=PATIENCE)
    atexit.register(_leave)
    if state.num_processes != size:
        raise MachineError(
            f"{size} processes were started and {state.num_processes} met: they would overwrite each other",
            fix=HOW,
        )
    return Processes(state.process_index, state.num_processes)


def _leave() -> None:
    """Destroy the process group before the interpreter exits: its threads sometimes abort an exiting process
    (`terminate called without an active exception`).
    """
    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
