"""The shipped architecture figures, and plans for them against arithmetic by hand."""

import pytest

from bilevel import LISA, All
from bilevel.config import load_config
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import Hardware
from bilevel.planning.plan import Plan, Setup, make_plan
from bilevel.plugins import Plugins
from bilevel_llm.model.token_losses import CHUNK
from tests.bilevel.planning.conftest import MODELS, PLANS

PUBLISHED = {"llama-3-8b": 8.03e9, "gemma-2-9b": 9.24e9, "qwen2-7b": 7.62e9, "qwen2.5-32b": 32.76e9}
LAYERS = {"llama-3-8b": 32, "gemma-2-9b": 42, "qwen2-7b": 28, "qwen2.5-32b": 64}
WIDTHS = {
    "llama-3-8b": (4096, 128256),
    "gemma-2-9b": (3584, 256000),
    "qwen2-7b": (3584, 152064),
    "qwen2.5-32b": (5120, 152064),
}
TOKENS = 2 * 1024  # two rows at a time
H100 = Hardware(gpus=8)


@pytest.fixture(scope="module")
def made() -> dict[str, Footprint]:
    return {}


@pytest.fixture
def model(recipe, made: dict[str, Footprint]):  # type: ignore[no-untyped-def]
    """Name -> footprint; a model is built once."""

    def footprint(name: str) -> Footprint:
        if name not in made:
            made[name] = Footprint(recipe(name).problem.cost(), "bfloat16")
        return made[name]

    return footprint


def plan(recipe, name: str, footprint: Footprint, active, hardware: Hardware = H100) -> Plan:  # type: ignore[no-untyped-def]
    config = recipe(name)
    return make_plan(footprint, Setup(config.backend, active, config.solver.workload(), 0, 300), hardware)


@pytest.mark.parametrize("name", MODELS)
def test_published_totals_come_out(model, name: str) -> None:  # type: ignore[no-untyped-def]
    footprint = model(name)
    assert footprint.parameters == pytest.approx(PUBLISHED[name], abs=0.005e9)
    assert len(footprint.blocks.repeated) == LAYERS[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "qwen2-7b" else pytest.mark.slow) for name in MODELS]
)
def test_every_model_fits_on_eight_gpus_with_lisa_as_by_hand(recipe, model, name: str) -> None:  # type: ignore[no-untyped-def]
    found = plan(recipe, name, model(name), LISA())
    layers, (hidden, vocabulary) = LAYERS[name], WIDTHS[name]
    tied = name.startswith("gemma")
    block = (PUBLISHED[name] - (1 if tied else 2) * hidden * vocabulary) / layers
    trained = 2 * block
    per_logit = 6 if tied else 4  # bytes: logits and their gradient; Gemma 2 also keeps its capped logits
    by_hand = {
        "parameters": 2 * 2 * PUBLISHED[name] / 8,
        "masters": 2 * 4 * trained / 8,
        "moments": 2 * 8 * trained / 8,
        "gradients": 2 * 4 * trained / 8,
        "activations": 2 * (layers + 1) * TOKENS * hidden,
        "output, loss and working memory": per_logit * TOKENS * vocabulary + 3 * 4 * CHUNK,
    }
    for part, size in by_hand.items():
        assert found.gpu[part] == pytest.approx(size, rel=0.03), part
    assert found.fits


def test_a_32b_model_fits_on_eight_gpus_with_lisa_and_not_without(recipe, model) -> None:  # type: ignore[no-untyped-def]
    footprint = model("qwen2.5-32b")
    assert plan(recipe, "qwen2.5-32b", footprint, LISA()).gpu_bytes < 40e9
    whole = plan(recipe, "qwen2.5-32b", footprint, All())
    assert not whole.fits
    states = sum(whole.gpu[part] for part in ("parameters", "masters", "moments", "gradients"))
    assert states == pytest.approx((2 + 4 + 8 + 4) * 2 * 32.76e9 / 8, rel=0.001)  # 147 GB


def test_flops_follow_from_the_number_of_parameters(model) -> None:  # type: ignore[no-untyped-def]
    """2 FLOPs a parameter and token forward, 2 for the inputs' gradients down to the lowest active block, 2 for weights."""
    footprint = model("qwen2-7b")
    hidden, vocabulary = WIDTHS["qwen2-7b"]
    products, block = footprint.parameters - hidden * vocabulary, footprint.sizes[footprint.blocks.repeated[0]]
    attention = 4 * 1024 * 1024 * hidden  # a layer's scores and their product with the values, for a row of 1024 tokens

    def flops(first: int) -> int:
        return footprint.passing(1, frozenset(footprint.blocks.repeated[first : first + 2]), recompute=False).flops

    above = 28 - 10
    for first, backward, layers in ((0, products, 28), (10, products - 10 * block, above)):
        expected = 1024 * 2 * (products + backward + 2 * block) + 28 * attention + layers * 2.5 * attention
        assert flops(first) == pytest.approx(expected, rel=0.003)


def test_shipped_recipes_build_with_the_backend_that_they_name(plugins: Plugins) -> None:
    for name in MODELS:
        config = load_config(PLANS / name / "recipe.yaml", plugins)
        assert config.backend.placement(8).split_parameters
