"""How a baseline trains its model: with the step size and the optimizer that the recipe gives to the lower level.

A baseline that trains with another step size than the method it is compared with shows what the step size does, not the
method. So whatever the section `baseline` leaves open is taken from the section `solver`, which is otherwise not used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bilevel import InputError, Solver
from bilevel.optimizer import SGD, AdamW
from bilevel.schedule import Schedule, at

LR: Schedule = 1e-5
"""The step size where neither the baseline nor the recipe has one: that of `scalebio` (`lr_z`), for models of billions of
parameters. Smaller models bear, and need, larger ones."""

_STEP_SIZES = (("lr_z", "optimizer_z"), ("lr_y", "optimizer_y"), ("lr", "optimizer"))
"""What solvers call the step size and the optimizer of their lower variable, the likeliest first."""


@dataclass(frozen=True)
class LowerTraining:
    """A step size of a model, and the optimizer that it belongs to."""

    lr: Schedule
    optimizer: SGD | AdamW

    @property
    def words(self) -> str:
        """The step size as a message names it."""
        return f"{self.lr:g}" if isinstance(self.lr, float | int) else f"a schedule that starts at {at(self.lr, 0):g}"


def lower_training(solver: Solver[Any] | None) -> LowerTraining | None:
    """How a solver trains its lower variable; None if there is no solver, or if it has no field for a step size.

    A solver without a field for the optimizer is taken to use AdamW.
    """
    for lr, optimizer in _STEP_SIZES:
        if (found := getattr(solver, lr, None)) is not None:
            return LowerTraining(found, getattr(solver, optimizer, None) or AdamW())
    return None


def chosen_training(
    name: str,
    lr: Schedule | None,
    optimizer: SGD | AdamW | None,
    solver: Callable[[], Solver[Any] | None],
    *,
    clip: float | None = None,
) -> LowerTraining:
    """The training of a baseline: its own keys, and for each that is None what the recipe's solver has.

    name: the baseline, for messages.
    solver: gives the recipe's solver, or None if there is none. It is called only if a key is None.
    clip: the norm at which gradients are clipped if the optimizer is the recipe's, and the recipe does not clip.

    Raises `InputError` if the step size would be the recipe's and the optimizer one of another kind: a step size of SGD says
    nothing about AdamW.
    """
    if lr is not None and optimizer is not None:
        return LowerTraining(lr, optimizer)
    recipe = lower_training(solver())
    if recipe is None:
        return LowerTraining(LR if lr is None else lr, optimizer or AdamW(clip=clip))
    if lr is None and optimizer is not None and type(optimizer) is not type(recipe.optimizer):
        raise InputError(
            f"{name}: baseline.optimizer is {optimizer.name}, and the step size of the recipe ({recipe.words}) is one of "
            f"{recipe.optimizer.name}, so that it says nothing here; set baseline.lr too"
        )
    if optimizer is None:
        optimizer = recipe.optimizer
        if optimizer.clip is None:
            optimizer = dataclasses.replace(optimizer, clip=clip)
    return LowerTraining(recipe.lr if lr is None else lr, optimizer)
