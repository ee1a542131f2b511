"""How many rows a run takes at a time, where its recipe leaves that to what fits the GPUs (`micro_batch_size: auto`)."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from bilevel.agreement import on_first
from bilevel.documents import read_json
from bilevel.errors import InputError
from bilevel.launch import local_world_size, world_size
from bilevel.ranges import Count
from bilevel.run import Run
from bilevel.run_directory import RunDirectory

log = logging.getLogger("bilevel")


@dataclass(frozen=True)
class MicroBatch:
    """The file micro_batch.json. A resumed run takes as many rows at a time as before, so that it rounds alike.

    rows: what a process takes at a time.
    """

    rows: Count

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self))


def choose_micro_batch(run: Run, directory: RunDirectory | None, *, resume: bool) -> MicroBatch | None:
    """Choose the largest micro-batch that fits by the plan, for all processes alike, and tell the backend.

    The problem is prepared, and nothing is placed yet.

    directory: that of the run; if it is resumed, what it has chosen before is chosen again.

    Returns None where there is nothing to choose, or no plan can be made: the backend then takes a process's whole share.
    Raises `InputError` if the run does not fit even with one row at a time.
    """
    backend = run.backend
    rooms = backend.all_gather(backend.room)
    room = min((each for each in rooms if each is not None), default=None)
    if room is None:
        return None

    def choose() -> MicroBatch | None:
        if resume and directory is not None and directory.micro_batch_file.exists():
            return read_json(directory.micro_batch_file, MicroBatch)
        return _planned(run, room)

    chosen = on_first(backend, choose)
    if chosen is not None:
        backend.take_at_a_time(chosen.rows)
        log.info("each process takes %d row%s at a time", chosen.rows, "s" if chosen.rows > 1 else "")
    return chosen


def _planned(run: Run, room: int) -> MicroBatch | None:
    from bilevel.planning.changes import advise
    from bilevel.planning.footprint import Footprint
    from bilevel.planning.hardware import GB, Hardware
    from bilevel.planning.load import Setup
    from bilevel.planning.plan import make_plan

    backend, processes = run.backend, run.backend.shard.world_size
    hardware = Hardware(processes, room / GB, gpus_per_node=local_world_size() or world_size())
    try:
        setup = Setup(backend, run.active, run.solver.workload(), run.seed, run.steps)
        # a problem without a cost of its own prepares itself for it, which is done once
        model = Footprint(copy.copy(run.problem).cost(), backend.placement(processes).dtype)
        plan = make_plan(model, setup, hardware)
    except InputError as error:
        log.warning("how many rows fit at a time cannot be planned, so each process takes its whole share: %s", error)
        return None
    if plan.fits:
        log.info("by its plan, the run takes %.1f of the %.1f GB of each GPU", plan.gpu_bytes / GB, hardware.gpu_memory)
        return MicroBatch(plan.rows)
    cheapest = advise(model, setup, hardware).cheapest
    raise InputError(
        f"by its plan, the run takes {plan.gpu_bytes / GB:.1f} GB on each GPU even with {plan.rows} row at a time, "
        f"and there are {hardware.gpu_memory:.1f} GB; "
        + (
            f"the cheapest change that fits is {' '.join(cheapest.words)}"
            if cheapest
            else "`bilevel plan` shows what would help"
        )
        + "; to try it nevertheless, set backend.micro_batch_size=1"
    )
