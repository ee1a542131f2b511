import pytest
import torch

from bilevel import SGD, Cosine, Descent, fit
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance


class Kept(TorchBackend):
    def close(self) -> None:
        self.last = {v.name: self.weights(v) for v in self._variables}
        super().close()


def test_z_follows_plain_gradient_descent_and_x_stays() -> None:
    """Float64, to the last bit but for the order of summation."""
    problem, backend = Distance(noise=0.3), Kept(device="cpu")
    lr = Cosine(peak=0.4, steps=6, warmup=2)
    history = fit(problem, Descent(lr=lr, optimizer=SGD()), backend, steps=6).history
    z = torch.zeros(problem.size, dtype=torch.float64)
    for t in range(6):
        (batch,) = problem.lower_batch(t, backend.shard)
        z = z - lr(t) * (z - batch).sum(0) / 4
    torch.testing.assert_close(backend.last["z"]["value"], z, rtol=1e-12, atol=1e-12)
    assert torch.equal(backend.last["x"]["value"], torch.zeros_like(z))
    assert [record.metrics["lr"] for record in history] == [lr(t) for t in range(6)]


def test_the_upper_loss_is_evaluated_on_the_same_batches_every_few_steps() -> None:
    problem = Distance(noise=0.3)
    history = fit(
        problem, Descent(lr=0.0, evaluate_every=3, evaluation_batches=2), TorchBackend(device="cpu"), steps=7
    ).history
    evaluated = {record.step: record.metrics["upper_loss"] for record in history if "upper_loss" in record.metrics}
    assert list(evaluated) == [0, 3, 6]
    assert len(set(evaluated.values())) == 1  # lr is 0, so anything else comes from the batches
    zero = torch.zeros(problem.size, dtype=torch.float64)
    batches = [problem.upper_batch(k, TorchBackend(device="cpu").shard)[0] for k in range(2)]
    expected = sum(float(problem.upper_loss(lambda: zero, lambda: zero, batch)) for batch in batches) / 2
    assert evaluated[0] == pytest.approx(expected, rel=1e-12)


def test_a_problem_without_upper_data_is_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distance, "upper_batch", lambda *_: [])
    history = fit(Distance(), Descent(evaluate_every=1), TorchBackend(device="cpu"), steps=2).history
    assert not any("upper_loss" in record.metrics for record in history)


@pytest.mark.parametrize("field", ["evaluate_every", "evaluation_batches"])
def test_counts_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        Descent(**{field: 0})
