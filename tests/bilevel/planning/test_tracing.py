"""What a traced pass counts, against counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel import InputError
from bilevel.tracing import trace_pass

ROWS, WIDTH = 16, 32
MATRIX = 2 * ROWS * WIDTH * WIDTH  # FLOPs of a product of the rows with one square matrix
BYTES = 4 * ROWS * WIDTH  # of one activation in float32


class Stack(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """x -> tanh(W tanh(x)): W needs tanh(x), tanh its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(torch.tanh(x)))


def trace(module: Stack, trained: set[int], **settings):  # type: ignore[no-untyped-def]
    return trace_pass(
        module,
        lambda: module(torch.empty(ROWS, WIDTH, device="meta")).sum(),
        trained=frozenset(f"layers.{i}.linear.weight" for i in trained),
        repeated=[f"layers.{i}" for i in range(len(module.layers))],
        **settings,
    )


def test_flops_are_those_of_the_products_that_are_needed() -> None:
    module = Stack()
    assert trace(module, {0, 1, 2, 3}).flops == (4 + 4 + 3) * MATRIX  # forward, weights, inputs of all but the lowest
    assert trace(module, {3}).flops == (4 + 1) * MATRIX
    assert trace(module, {1}).flops == (4 + 1 + 2) * MATRIX
    assert trace(module, set()).flops == 4 * MATRIX


def test_blocks_below_the_lowest_active_one_keep_nothing() -> None:
    module = Stack()
    # kept for the backward pass: two results of tanh a layer, from the active one on. Alive at that moment too: the input
    # of the stack, and that of the last layer, which is a result of tanh itself.
    assert trace(module, {0}).kept == (1 + 4 * 2) * BYTES
    assert trace(module, {2}).kept == (1 + 2 * 2) * BYTES
    assert trace(module, {3}).kept == (1 + 1 + 2) * BYTES
    assert trace(module, set()).kept == (1 + 1 + 1) * BYTES


def test_recomputed_blocks_keep_their_inputs_alone_and_compute_once_more() -> None:
    module = Stack()
    plain, recomputed = trace(module, {0, 1, 2, 3}), trace(module, {0, 1, 2, 3}, recompute=True)
    assert recomputed.kept == (4 + 1) * BYTES
    assert recomputed.kept < plain.kept
    assert recomputed.flops == plain.flops + 3 * MATRIX + MATRIX  # the last product of a block is done again for its tanh
    assert trace(module, {0, 1, 2, 3}) == plain, "the module is as before"


def test_the_peak_at_the_loss_and_the_peak_in_the_blocks_are_told_apart() -> None:
    module = Stack(1)
    wide = 50

    def traced(in_block: int, at_loss: int):  # type: ignore[no-untyped-def]
        def loss() -> torch.Tensor:
            x = torch.empty(ROWS, WIDTH, device="meta").repeat(1, in_block)[:, :WIDTH]
            return module(x).repeat(1, at_loss).exp().sum()

        return trace_pass(module, loss, trained=frozenset(["layers.0.linear.weight"]), repeated=["layers.0"])

    plain, before, after = traced(1, 1), traced(wide, 1), traced(1, wide)
    assert before.block_peak > plain.block_peak + (wide - 2) * BYTES  # what comes before the blocks counts with them
    assert after.block_peak < plain.block_peak + 3 * BYTES
    assert after.loss_peak > plain.loss_peak + 2 * (wide - 2) * BYTES
    assert after.peak == after.loss_peak


def test_a_gradient_counts_for_a_moment_only() -> None:
    wide = 64 * WIDTH
    with torch.device("meta"):
        layers = nn.ModuleList(nn.Linear(wide, wide, bias=False) for _ in range(6))
    module = nn.ModuleDict({"layers": layers})

    def loss() -> torch.Tensor:
        x = torch.empty(1, wide, device="meta")
        for layer in layers:
            x = layer(x)
        return x.sum()

    traced = trace_pass(module, loss, trained=frozenset(name for name, _ in module.named_parameters()))
    assert 4 * wide * wide < traced.peak < 1.1 * 4 * wide * wide
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_keeps_no_matrix_of_scores(grouped: bool) -> None:
    heads, size = 4, 8

    def kept(length: int):  # type: ignore[no-untyped-def]
        module = nn.Identity()
        q = torch.empty(1, heads, length, size, device="meta", requires_grad=True)
        k = torch.empty(1, heads // 2 if grouped else heads, length, size, device="meta", requires_grad=True)
        return trace_pass(
            module,
            lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=grouped).sum(),
            trained=frozenset(),
        )

    short, long = kept(64), kept(128)
    scalars = 8  # the loss and its gradient
    assert long.peak - scalars == 2 * (short.peak - scalars)
    assert long.flops == (4 + 10) * heads * 128 * 128 * size


def test_a_module_that_needs_values_is_refused() -> None:
    module = nn.Identity()
    yes = torch.ones(3, device="meta")
    assert trace_pass(module, lambda: yes * 1 if bool((yes > 0).all()) else yes.repeat(9), trained=frozenset()).kept == 12
    with pytest.raises(InputError, match="decides by the values"):
        trace_pass(module, lambda: yes * float(yes.sum()), trained=frozenset())
