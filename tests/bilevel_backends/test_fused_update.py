"""One kernel updates all masters of a variable, wherever they are."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import SGD, AdamW
from bilevel_backends.module_backend import one_block
from bilevel_backends.processes import Grid, Processes
from bilevel_backends.sharding.partitioned import Partitioned
from bilevel_backends.sharding.unsharded import Unsharded
from bilevel_backends.variable import ModuleVariable


@pytest.mark.parametrize("optimizer", [AdamW(), SGD(momentum=0.9)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("offload", [None, torch.device("cpu")], ids=["in place", "offloaded"])
@pytest.mark.parametrize(
    "sharding",
    [Unsharded, partial(Partitioned, grid=Grid.alone(), device=torch.device("cpu"), reduces_at_step=True)],
    ids=["whole", "sharded"],
)
def test_masters_are_updated_by_the_fused_kernel(
    sharding: Any, offload: torch.device | None, optimizer: SGD | AdamW
) -> None:
    module = nn.Linear(3, 2).to(torch.bfloat16)
    variable = ModuleVariable("y", sharding(module), optimizer, one_block(module), Processes(), offload)
    variable.activate(variable.blocks.names)
    for name in variable.masters:
        variable.add(name, torch.ones_like(variable.masters[name]), 1.0)
    variable.step(0.1, None)
    assert variable.optimizer is not None
    assert all(group["fused"] for group in variable.optimizer.param_groups)
