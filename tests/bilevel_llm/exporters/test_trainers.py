"""The trainers' own parsers read what is exported. Run by `make test-trainers`, which installs those of trainers.txt."""

import importlib
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from bilevel.plugins import Plugins
from bilevel_llm.exporters.run import export, find_exporter, write
from tests.bilevel_llm.exporters.test_run import mixed, sharegpt, talks
from tests.bilevel_llm.tiny import AVERAGE, alpaca

MakeRun = Callable[..., Path]

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("default"),  # what trainers warn about is not ours
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("trainer", ["trl", "llamafactory", "axolotl"])
def test_the_installed_version_is_one_that_the_exporter_knows(plugins: Plugins, trainer: str) -> None:
    assert str(find_exporter(trainer, plugins).known_version(version(trainer))) == version(trainer)


def modules_of(package: str, parts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports modules of a package without the __init__ of its parts, which would import all that training needs."""
    (root,) = importlib.util.find_spec(package).submodule_search_locations
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    for part in parts:
        bare = ModuleType(f"{package}.{part}")
        bare.__path__ = [str(Path(root, *part.split(".")))]
        monkeypatch.setitem(sys.modules, bare.__name__, bare)
    return lambda name: importlib.import_module(f"{package}.{name}")


# --------------------------------------------------------------------------------------------------------------------- TRL


def read_by_trl(run: Path, plugins: Plugins, file: Path, **settings: Any) -> Any:
    """The mixture that `trl sft --config FILE` would train on."""
    from trl.scripts.utils import DatasetMixtureConfig, TrlParser, get_dataset

    write(export(run, "trl", plugins, trainer_version=version("trl"), **settings), file)
    (config,) = TrlParser((DatasetMixtureConfig,)).parse_args_and_config(["--config", str(file)])
    return get_dataset(config)["train"]


def test_trl_mixes_by_the_fractions(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = make_run({"web": talks("web", 90), "books": talks("books", 60), "chat": talks("chat", 50)})
    data = read_by_trl(run, plugins, tmp_path / "trl.yaml")
    assert data.column_names == ["messages"]
    counts = Counter(row["messages"][0]["content"].split()[0] for row in data)
    assert counts == {"web": 90, "books": 54, "chat": 36}  # as large as it can be without a row twice


def test_trl_reads_the_mix(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = make_run()
    file = mixed(run, plugins, tmp_path / "mix.parquet", format="messages")
    data = read_by_trl(run, plugins, tmp_path / "trl.yaml", mix=file)
    assert Counter(row["messages"][0]["content"].split()[0] for row in data) == {"web": 15, "books": 9, "chat": 6}


# ----------------------------------------------------------------------------------------------------------- LLaMA-Factory


@pytest.fixture
def llamafactory(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of LLaMA-Factory, without audio, web and training."""
    return modules_of("llamafactory", ("data", "hparams", "extras"), monkeypatch)


def test_llamafactory_interleaves_by_the_probabilities(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path, llamafactory: Callable[[str], ModuleType]
) -> None:
    from datasets import load_dataset

    sources = {"web": alpaca("web", 900), "books": talks("books", 600), "chat": sharegpt(400)}
    write(export(make_run(sources), "llamafactory", plugins, output=tmp_path / "lf"), tmp_path / "lf")
    settings = yaml.safe_load((tmp_path / "lf" / "data.yaml").read_text())
    arguments = llamafactory("hparams.data_args").DataArguments(**settings)
    assert arguments.interleave_probs == pytest.approx(list(AVERAGE.values()), abs=1e-15)
    described = llamafactory("data.parser").get_dataset_list(arguments.dataset, arguments.dataset_dir)
    parts = []
    for name, attributes in zip(arguments.dataset, described, strict=True):
        assert attributes.load_from == "file"
        part = load_dataset("json", data_files=str(Path(arguments.dataset_dir, attributes.dataset_name)), split="train")
        parts.append(part.map(lambda row, name=name: {"name": name}, remove_columns=part.column_names))
    merged = llamafactory("data.data_utils").merge_dataset(parts, arguments, seed=0)
    shares = {name: count / len(merged) for name, count in Counter(merged["name"]).items()}
    assert shares == pytest.approx(AVERAGE, abs=0.04)  # 3 standard errors of about 1800 draws


def test_llamafactory_reads_every_kind_of_row(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path, llamafactory: Callable[[str], ModuleType]
) -> None:
    sources = {"web": alpaca("web", 9), "books": talks("books", 6), "chat": sharegpt(4)}
    write(export(make_run(sources), "llamafactory", plugins, output=tmp_path / "lf"), tmp_path / "lf")
    arguments = llamafactory("hparams.data_args").DataArguments(
        **yaml.safe_load((tmp_path / "lf" / "data.yaml").read_text())
    )
    described = llamafactory("data.parser").get_dataset_list(arguments.dataset, arguments.dataset_dir)
    converters = llamafactory("data.converter").DATASET_CONVERTERS
    for rows, attributes in zip(sources.values(), described, strict=True):
        convert = converters[attributes.formatting](attributes, arguments)
        for row in rows:
            read = convert(row)
            turns = row.get("messages") or row.get("conversations")
            question = turns[0].get("content") or turns[0].get("value") if turns else row["instruction"]
            answer = turns[1].get("content") or turns[1].get("value") if turns else row["output"]
            assert read["_prompt"] == [{"role": "user", "content": question}]
            assert read["_response"] == [{"role": "assistant", "content": answer}]


# ----------------------------------------------------------------------------------------------------------------- axolotl


@pytest.fixture(params=[("mix.jsonl", "source"), ("mix.parquet", "messages")], ids=str)
def axolotl_settings(request: pytest.FixtureRequest, make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> dict[str, Any]:
    """What is written for a mix of 15, 9 and 6 rows."""
    name, format = request.param
    run = make_run()
    file = mixed(run, plugins, tmp_path / name, format=format)
    (text,) = export(run, "axolotl", plugins, mix=file).values()
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings


def test_axolotl_accepts_the_settings_and_ignores_none(axolotl_settings: dict[str, Any]) -> None:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    rest = {
        "base_model": "any",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 1e-4,
    }
    (entry,) = AxolotlInputConfig(**axolotl_settings, **rest).datasets
    (written,) = axolotl_settings["datasets"]
    assert {key: getattr(entry, key) for key in written} == written


def test_axolotl_loads_the_mix(axolotl_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    axolotl = modules_of("axolotl", ("utils.data",), monkeypatch)
    loading, dictionary = axolotl("utils.data.shared"), axolotl("utils.dict").DictDefault
    (entry,) = axolotl_settings["datasets"]
    data = loading.load_dataset_with_config(dictionary({**entry, "split": "train"}), use_auth_token=False)
    assert Counter(row["source"] for row in data["_bilevel"]) == {"web": 15, "books": 9, "chat": 6}


# ---------------------------------------------------------------------------------------------------------------- Megatron


def test_nemo_reads_the_blend(make_run: MakeRun, plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function by which NeMo Automodel, like Megatron-LM, takes a list of weights and prefixes apart."""
    run = make_run({name: [{"text": f"{name} {i}"} for i in range(20)] for name in ("web", "books", "chat")})
    write(export(run, "megatron", plugins), tmp_path / "blend.json")
    parts = ("components", "components.datasets", "components.datasets.llm", "components.datasets.llm.megatron")
    load = modules_of("nemo_automodel", parts, monkeypatch)
    reader = load("components.datasets.llm.megatron.megatron_utils")
    prefixes, weights = reader.get_blend_from_list(json.loads((tmp_path / "blend.json").read_text()))
    assert [Path(prefix).name for prefix in prefixes] == [f"{name}_text_document" for name in ("web", "books", "chat")]
    assert sum(weights) == pytest.approx(1)
    assert weights[0] > weights[1] > weights[2]
