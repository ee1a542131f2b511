"""TensorBoard events in the run directory: every number of every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bilevel.hookspecs import hookimpl

if TYPE_CHECKING:
    from bilevel.record import Record
    from bilevel.run import Run


class TensorBoardLogger:
    """Writes scalars; nested names become groups ("upper/reference")."""

    def __init__(self) -> None:
        self._writer: Any = None

    @hookimpl
    def bilevel_run_start(self, run: Run) -> None:
        """Open the event file; steps that a resumed run will do again are marked as void."""
        if run.output is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run.output / "tensorboard"), purge_step=run.start or None)

    @hookimpl
    def bilevel_step_end(self, record: Record) -> None:
        """Write the step's numbers."""
        if self._writer is None:
            return
        named = {**record.parts, "upper": record.upper, "average": record.average}
        known = {"seconds": record.seconds, "size": record.size, "optimizer_bytes": record.optimizer_bytes}
        for key, value in {**record.metrics, **known}.items():
            self._writer.add_scalar(key, value, record.step)
        for group, values in named.items():
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, record.step)
        self._writer.flush()

    @hookimpl
    def bilevel_run_end(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


logger = TensorBoardLogger()
