import torch

from bilevel_llm.data.constant import Constant


def test_a_constant_is_converted_once_for_every_precision() -> None:
    constant, losses = Constant(torch.arange(3)), torch.ones(2, dtype=torch.float32)
    found = constant.like(losses)
    assert found.dtype == torch.float32
    assert found.tolist() == [0.0, 1.0, 2.0]
    assert constant.like(torch.zeros(5)) is found
    assert constant.like(losses.double()).dtype == torch.float64
