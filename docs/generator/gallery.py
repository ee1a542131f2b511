"""The page that shows all examples: of each, its name, the first sentence that it says of itself, and what it draws."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "examples/index.md"
FIRST = "examples/reweighting.md"  # what most come for
FOLDERS = {
    "smallest": "The smallest run: weights of clean and of flipped sources of numbers, in seconds (`examples/smallest`).",
    "python_docs": "The demo of the README: four sources of text and SmolLM2-135M, in minutes (`examples/python_docs`).",
    "plans": "Recipes of models from 7B to 70B parameters, to be planned for GPUs (`examples/plans`).",
    "third_party_plugin": "A package of your own, with a problem that recipes can name (`examples/third_party_plugin`).",
}
"""What is no notebook: a folder of the repository's `examples`, and what it is."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page. The notebooks are files already."""
    uris = sorted(file.src_uri for file in files if file.src_uri.startswith("examples/"))
    pages = sorted((uri for uri in uris if uri.endswith(".md")), key=lambda uri: (uri != FIRST, uri))
    cards = [_card(uri, files, uris) for uri in pages]
    cards += [f"-   **{name}**\n\n    {sentence}\n" for name, sentence in FOLDERS.items()]
    content = '# Examples\n\n<div class="grid cards" markdown>\n\n' + "\n".join(cards) + "\n</div>\n"
    files.append(File.generated(config, PAGE, content=content))
    return files


def _card(uri: str, files: Files, uris: list[str]) -> str:
    file = files.get_file_from_path(uri)
    assert file is not None
    text = file.content_string
    title, body = re.match(r"# (.+)\n+((?:.+\n?)+)", text).groups()  # type: ignore[union-attr]
    sentence = re.split(r"(?<=[.?!])\s(?=[A-Z])", " ".join(body.split()))[0].rstrip(":")
    name = uri.removeprefix("examples/")
    pictures = [each.removeprefix("examples/") for each in uris if each.startswith(uri[:-3]) and each.endswith(".png")]
    shown = f"    ![{title}]({pictures[0]})\n\n" if pictures else ""
    return f"-   **[{title}]({name})**\n\n{shown}    {sentence}\n"
