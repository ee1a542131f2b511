"""The example notebooks run from top to bottom, with a tiny model in place of a real one."""

from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.bilevel_llm.tiny import FAMILIES, make_tokenizer

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
CELL = 120  # seconds, beyond which a cell is taken to hang


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("name", sorted(file.name for file in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebook_is_stored_as_it_was_run(name: str) -> None:
    """What readers see was computed, in one pass from top to bottom, without an error."""
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    stored = outputs(read(name))
    assert stored
    assert not [output for output in stored if output.output_type == "error"]


@pytest.mark.parametrize("name", ["new_problem.ipynb", "verify.ipynb"])
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    run(read(name), tmp_path)


def test_the_reweighting_notebook_runs_and_shows_progress_in_one_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["llama"]()).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    notebook = read("reweighting.ipynb")
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += f"\nMODEL, ROWS, STEPS, MAX_LENGTH = {str(tmp_path / 'model')!r}, 12, 4, 32\n"
    parameters.source += "SETTINGS = {'solver.horizon': 2, 'active': {'name': 'all'}}\n"
    run(notebook, tmp_path)
    shown = [output for output in outputs(notebook) if "<progress" in str(output.get("data", {}).get("text/html"))]
    assert len(shown) == 1
    assert "step 4 of 4" in shown[0].data["text/html"]
    assert (tmp_path / "runs" / "reweighting" / "report.html").exists()


def run(notebook: Any, folder: Path) -> None:
    nbclient.NotebookClient(notebook, timeout=CELL, resources={"metadata": {"path": str(folder)}}).execute()
