"""A backend that only plans: one whose settings are those of ZeRO, so that plans for several GPUs need no such library."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bilevel.backend import Placement
from bilevel_backends.torch_backend import TorchBackend


@dataclass
class Zero(TorchBackend):
    """Stages as DeepSpeed numbers them: 1 splits masters and moments, 2 gradients too, 3 parameters too."""

    micro_batch_size: int | Literal["auto"] | None = None
    zero_stage: int = 3
    offload_optimizer: bool = False
    offload_parameters: bool = False
    live_parameters: int = 0
    fetched_parameters: int = 0
    whole_units: bool = False
    message: int | None = None
    shard_group: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError("offload_parameters needs zero_stage 3")

    def savings(self, rows: int) -> dict[str, Sequence[Any]]:
        wider: dict[str, Sequence[Any]] = {} if self.shard_group is None else {"shard_group": [None]}
        more = {"zero_stage": range(self.zero_stage + 1, 4), "offload_optimizer": [True], "offload_parameters": [True]}
        return {**super().savings(rows), **more, **wider}

    def speedups(self, processes: int, node: int) -> dict[str, Sequence[Any]]:
        return {"shard_group": [node]} if processes > node else {}

    def placement(self, world_size: int) -> Placement:
        return Placement(
            "zero",
            world_size,
            self.shard_group,
            dtype=self.dtype,
            micro_batch_size=self.micro_batch_size,
            activation_checkpointing=self.activation_checkpointing,
            split_optimizer=self.zero_stage >= 1,
            split_gradients=self.zero_stage >= 2,
            split_parameters=self.zero_stage >= 3,
            offload_optimizer=self.offload_optimizer,
            live_parameters=self.live_parameters,
            fetched_parameters=self.fetched_parameters,
            message=self.message,
            whole_units=self.whole_units,
            offload_parameters=self.offload_parameters,
        )
