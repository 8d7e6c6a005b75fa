"""Several processes that train one model together, started by torchrun or `accelerate launch`.

Every process runs the same command. The first one does the work of all stages and owns the run's files; the
others join it in `train` and wait otherwise. Each process sees its share of every batch, and the gradients
are averaged before they are clipped, so that N processes make the updates of one. FSDP is refused: it splits
tensors between processes, and a scale of a weight that nobody holds whole cannot be learned.

Torch is imported only where there are several processes.
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
"""How long a process waits for the first one, which may be measuring for hours."""

HOW = "start with `torchrun --nproc_per_node N -m qcompress run ...` or `accelerate launch --multi_gpu`"


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that owns the run's files."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """The rows of a batch that this process sees, as many as every other one."""
        return list(rows[self.rank :: self.size])

    def agree(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        import torch.distributed as distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
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
    """How many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(cpu: bool) -> Processes:
    """Meet the other processes that the launcher started; alone where there is no launcher.

    Raises MachineError where a launcher started something else than it seems.
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

    found = PartialState(cpu=cpu, timeout=PATIENCE)
    atexit.register(_leave)
    if found.num_processes != size:
        raise MachineError(
            f"{size} processes were started and {found.num_processes} met: they would overwrite each other",
            fix=HOW,
        )
    return Processes(found.process_index, found.num_processes)


def _leave() -> None:
    """Part from the others before the interpreter ends: a group that is still there has running threads, and
    they abort a process now and then (`terminate called without an active exception`).
    """
    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
