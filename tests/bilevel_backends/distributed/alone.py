"""One process that carries out every collective, as if there were others: NCCL can then be tried with one GPU."""

from typing import Any

from bilevel_backends.processes import Processes


class NotAlone(int):
    """The number 1, which says that it is more: what compares it to find that there is nobody else does not find that."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NotAlone)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, NotAlone)

    def __gt__(self, other: Any) -> bool:
        return other == 1 or int(self) > other


def skip_no_collective() -> None:
    """Let every `Processes` that is made from now on carry out its collectives."""
    init = Processes.__init__

    def carry_out(self: Processes, *args: Any, **settings: Any) -> None:
        init(self, *args, **settings)
        if int(self.world_size) == 1:
            self.world_size = NotAlone(1)

    Processes.__init__ = carry_out  # type: ignore[method-assign]
