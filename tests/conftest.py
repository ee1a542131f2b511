"""Shared by all tests: one thread a process (pytest-xdist runs two), and small problems with known answers."""

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from xdist.scheduler import LoadScopeScheduling

from bilevel import Problem, Shard
from bilevel.data import generator
from bilevel.plugins import Plugins, load_plugins

WARM = (
    "tests/bilevel_backends/distributed/",
    "tests/benchmarks/test_collectives.py",
    "tests/bilevel/test_cli.py",
    "tests/warm/",
)
"""Tests that start processes, of which one `warm_python` serves all."""
LONG = (*WARM, "tests/examples/", "tests/faults/", "tests/bilevel_theory/", "tests/bilevel_llm/comparison/")


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Tests of a file share what takes long to make, and so do those of `WARM`: they go to the same worker."""

    def _split_scope(self, nodeid: str) -> str:
        return "warm" if nodeid.startswith(WARM) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    config.option.loadscopereorder = False  # by the number of tests
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left with it while the others are done."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def plugins() -> Plugins:
    """First-party plugins only: what else is installed on a developer's machine must not change a test."""
    own = [point for point in entry_points(group="bilevel") if point.name.startswith("bilevel")]
    return load_plugins(own)


class Held(nn.Module):
    """A vector variable."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.value * 1


@dataclass
class Distance(Problem[Tensor]):
    """f = ½‖y - t‖² + ½ r‖x‖², g = ½‖y - M x‖², with noise in both targets: a bilevel least squares.

    y*(x) = M x;  x* = (M'M + r)⁻¹ M't.
    """

    size: int = 3
    noise: float = 0.0
    ridge: float = 0.5
    double: bool = True

    def __post_init__(self) -> None:
        self.dtype = torch.float64 if self.double else torch.float32
        g = torch.Generator().manual_seed(0)
        self.m = torch.randn(self.size, self.size, generator=g, dtype=self.dtype) / self.size**0.5 + torch.eye(
            self.size, dtype=self.dtype
        )
        self.t = torch.arange(1, self.size + 1).to(self.dtype)

    def solution(self) -> Tensor:
        eye = torch.eye(self.size, dtype=self.dtype)
        return torch.linalg.solve(self.m.T @ self.m + self.ridge * eye, self.m.T @ self.t)

    def penalized_solution(self, penalty: float) -> Tensor:
        """Stationary point of min_y [f + penalty g] - penalty min_z g, in closed form: ½ a/(1+a) ‖Mx - t‖² + ½ r‖x‖²."""
        share = penalty / (1 + penalty)
        eye = torch.eye(self.size, dtype=self.dtype)
        return torch.linalg.solve(share * self.m.T @ self.m + self.ridge * eye, share * self.m.T @ self.t)

    def upper(self) -> nn.Module:
        return Held(torch.zeros(self.size, dtype=self.dtype))

    def lower(self) -> nn.Module:
        return Held(torch.zeros(self.size, dtype=self.dtype))

    def upper_loss(self, x, y, batch):  # type: ignore[no-untyped-def]
        rows = len(batch) / 4
        return ((y() - self.t - batch) ** 2).sum() / 8 + rows * self.ridge * (x() ** 2).sum() / 2

    def lower_loss(self, x, y, batch):  # type: ignore[no-untyped-def]
        return ((y() - self.m.to(batch.device) @ x() - batch) ** 2).sum() / 8

    def upper_batch(self, index: int, shard: Shard) -> list[Tensor]:
        return self._batch(101, index, shard)

    def lower_batch(self, index: int, shard: Shard) -> list[Tensor]:
        return self._batch(102, index, shard)

    def summary(self, x):  # type: ignore[no-untyped-def]
        return {f"x{i}": float(value) for i, value in enumerate(x())}

    def _batch(self, stream: int, index: int, shard: Shard) -> list[Tensor]:
        rows = generator(shard.seed, stream, index).normal(0, self.noise, (4, self.size)) if self.noise else None
        batch = torch.zeros(4, self.size) if rows is None else torch.from_numpy(rows)
        return [torch.stack(list(part)) for part in shard.split(list(batch.to(self.dtype)))]
