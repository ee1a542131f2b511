"""A small module whose memory can be counted on paper, as a problem's cost."""

import torch
from torch import Tensor, nn

from bilevel import find_blocks
from bilevel.cost import Cost

WIDTH = 8
HIDDEN = [16, 16, 64, 16]  # the third block is the largest


class Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.layers = nn.ModuleList(Layer(hidden) for hidden in HIDDEN)
        self.head = nn.Linear(WIDTH, 10, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


SIZES = [2 * WIDTH * hidden for hidden in HIDDEN]
OUTSIDE = 10 * WIDTH  # embedding and head each
TOTAL = sum(SIZES) + 2 * OUTSIDE


def build() -> nn.Module:
    with torch.device("meta"):
        return Small()


def loss(module: nn.Module, rows: int) -> Tensor:
    return module(torch.empty(rows, dtype=torch.int64, device="meta")).float().sum()


def small_cost(lower_rows: int = 8, upper_rows: int = 8) -> Cost:
    return Cost(build, find_blocks, loss, lower_rows, upper_rows)
