"""LoRA adapters (Hu et al., ICLR 2022, arXiv 2106.09685), by peft: only the adapters require gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bilevel import InputError
from bilevel_llm.model.files import ReadWeight


@dataclass(frozen=True)
class LoRA:
    """W + alpha/rank · B A in place of W, with B starting at 0, so that the model starts where it was.

    rank: the rank of B A.
    alpha: the numerator of the factor alpha/rank that scales the update; twice the rank is the usual choice.
    targets: names of the linear layers to adapt. "all-linear", every one but the output layer, is what it takes to come
        close to full fine-tuning (Dettmers et al., "QLoRA", NeurIPS 2023, arXiv 2305.14314, figure 2).

    quantize: hold the base in 4 bits, by bitsandbytes: "nf4" is NormalFloat with quantized scales, about 0.52 bytes for each
        weight of the linear layers but the head. Every pass takes longer, and the model is a slightly different one. Not
        for backends that split parameters. None: in the precision of the backend.

    There is no dropout: a loss must be a function of weights and batch alone.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | list[str] = "all-linear"
    quantize: Literal["nf4"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, not {self.alpha}")

    def wrap(self, model: Any) -> Any:
        """The model with fresh adapters and everything else frozen.

        Adapters are on torch's default device, with the same initial values for a model on the meta device as for one with
        weights. Raises `InputError` without peft, or if `targets` fit nothing.
        """
        require_peft()
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, target_modules=self.targets, task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # set right by peft itself, as it says
            warnings.simplefilter("ignore", FutureWarning)  # peft's own use of names that transformers will drop
            try:
                with _stand_ins(model):
                    return get_peft_model(model, config)
            except ValueError as error:
                raise InputError(f"problem.lora.targets is {self.targets!r}: {error}") from error


def require_peft() -> None:
    """Raise `InputError` if peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError(f"LoRA needs the package peft ({error}): pip install 'bilevel[llm]'") from error


def read_with_adapters(adapted: Any, read: ReadWeight) -> ReadWeight:
    """How to read the parameters of a model that `LoRA.wrap` has wrapped on the meta device: adapters as they are.

    read: (name before it was wrapped) -> its values.
    """

    def read_adapted(name: str) -> Tensor:
        parameter: Tensor = adapted.get_parameter(name)
        if not parameter.is_meta:
            return parameter.detach()
        return read(name.removeprefix("base_model.model.").replace(".base_layer.", "."))

    return read_adapted


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Within, parameters on the meta device are on the default device, one number seen as a whole tensor.

    peft would put the adapters on the meta device, too, and so lose their initial values.
    """
    places = [
        (owner, attribute, parameter)
        for owner in model.modules()
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.is_meta
    ]
    stand_ins = {
        id(parameter): nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
        for _, _, parameter in places
    }
    for owner, attribute, parameter in places:
        setattr(owner, attribute, stand_ins[id(parameter)])
    try:
        yield
    finally:
        for owner, attribute, parameter in places:
            setattr(owner, attribute, parameter.requires_grad_(stand_ins[id(parameter)].requires_grad))
