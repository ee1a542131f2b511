"""The example notebooks as pages of the site: their text, their code, and what it printed and drew when it was last run."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and its pictures."""
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        pictures: dict[str, bytes] = {}
        content = "\n\n".join(_parts(notebook, pictures)) + "\n"
        files.append(File.generated(config, f"examples/{notebook.stem}.md", content=content))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"examples/{name}", content=picture))
    return files


def _parts(notebook: Path, pictures: dict[str, bytes]) -> Iterator[str]:
    """The paragraphs of a notebook's page. pictures: receives what is drawn, file name -> PNG."""
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
        else:
            yield _fenced("python", source)
            for output in cell["outputs"]:
                yield _shown(output, notebook.stem, pictures)
        if number == 0:
            yield f"*This page is a notebook: `{notebook.relative_to(ROOT)}` in the repository.*"


def _shown(output: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> str:
    """What a reader sees of an output: the richest form that a page can hold."""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        return f"![What the cell above draws]({name})"
    if "text/html" in data:
        return "".join(data["text/html"])
    return _fenced("text", "".join(output.get("text", data.get("text/plain", ""))).rstrip("\n"))


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
