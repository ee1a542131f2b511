"""Settings given in Python are held to what a recipe's are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from torch import nn

from bilevel import AdamW, InputError, Power, ScaleBiO
from bilevel.plugins import Plugins
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: ScaleBiO(lr_z=-1.0), "ScaleBiO.lr_z is -1.0: .*greater than or equal to 0"),
        (lambda: ScaleBiO(lr_z="much"), "ScaleBiO.lr_z is 'much': .*valid number"),  # type: ignore[arg-type]
        (lambda: ScaleBiO(optimizer_z="adamw"), "ScaleBiO.optimizer_z is 'adamw'"),  # type: ignore[arg-type]
        (lambda: TorchBackend(dtype="bf61"), "TorchBackend.dtype is 'bf61': .*'bfloat16'"),  # type: ignore[arg-type]
        (lambda: Distance(size="three"), "Distance.size is 'three': .*valid integer"),  # type: ignore[arg-type]
        (lambda: Derived(size=2, module=3), "Derived.module is 3: .*instance of Module"),  # type: ignore[arg-type]
    ],
)
def test_a_value_that_a_recipe_could_not_have_is_refused_by_its_name(made: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        made()


@dataclass
class Derived(Distance):
    """A class of a user's, without a check of its own."""

    module: nn.Module = field(default_factory=nn.Identity)
    unknown: "Callable[[NotImported], int] | None" = None  # type: ignore[name-defined] # noqa: F821


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        ScaleBiO(lr_z=-1.0, lr_x=float("inf"))
    assert [line.partition(" is ")[0] for line in str(caught.value).splitlines()] == ["ScaleBiO.lr_x", "ScaleBiO.lr_z"]


def test_what_a_recipe_may_write_in_short_may_be_given_in_python() -> None:
    solver = ScaleBiO(lr_z={"name": "power", "start": 0.5, "exponent": -1.0}, optimizer_z={"name": "adamw", "clip": 1.0})  # type: ignore[arg-type]
    assert solver == ScaleBiO(lr_z=Power(0.5, -1.0), optimizer_z=AdamW(clip=1.0))
    assert type(ScaleBiO(warmup=np.int64(3)).warmup) is int  # type: ignore[arg-type]
    assert ScaleBiO(lr_z=np.float32(0.5)).lr_z == 0.5  # type: ignore[arg-type]


def test_what_is_right_passes_whatever_class_it_is_of(plugins: Plugins) -> None:
    for part in plugins.parts["solvers"].values():
        part.load()()
    module = nn.Linear(1, 1)
    assert Derived(module=module).module is module
