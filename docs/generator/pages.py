"""The pages of the documentation site, for mkdocs: those of docs/, some of the repository's root, and the API reference.

A page's name says which of the four kinds of documentation it is (tutorial-, how-to-, reference-, explanation-), and puts
it into the navigation; there is no list to keep. Links are written for readers of the repository; what the site does not
hold (a folder of examples) becomes a path there.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PUBLISHED = [ROOT / path for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
DEVELOPMENT = ("CONTRIBUTING.md", "ARCHITECTURE.md", "RELEASING.md", "SECURITY.md", "CHANGELOG.md")
KINDS = {"Tutorials": "tutorial-", "How-to guides": "how-to-", "Reference": "reference", "Explanation": "explanation-"}

SITE = {name: name.lower() for name in DEVELOPMENT}
"""The pages that live outside docs/: path in the repository -> path on the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the navigation."""
    for name, uri in SITE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    packages = dict(api_pages())
    overview = "# API reference\n\nOne page for each package, from its docstrings.\n\n"
    for package, (purpose, content) in packages.items():
        files.append(File.generated(config, f"api/{package}.md", content=content))
        overview += f"- [`{package}`]({package}.md): {purpose}\n"
    files.append(File.generated(config, "api/index.md", content=overview))

    pages = sorted(file.src_uri for file in files.documentation_pages() if "/" not in file.src_uri)
    examples = [file.src_uri for file in files.documentation_pages() if file.src_uri.startswith("examples/")]
    config.nav = [
        "index.md",
        *({kind: [page for page in pages if page.startswith(prefix)]} for kind, prefix in KINDS.items()),
        {"Examples": sorted(examples, key=lambda uri: (uri != "examples/index.md", uri))},
        {"API": ["api/index.md", *(f"api/{package}.md" for package in packages)]},
        {"Development": list(SITE.values())},
    ]
    return files


def api_pages() -> Iterator[tuple[str, tuple[str, str]]]:
    """For every published package that has modules: its name, what it is for, and its page."""
    for root in PUBLISHED:
        for package in sorted(path.parent for path in root.rglob("__init__.py")):
            name = ".".join(package.relative_to(root.parent).parts)
            purpose = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or name
            modules = sorted(path.stem for path in package.glob("*.py") if not path.stem.startswith("_"))
            content = f"# {name}\n\n{purpose}\n\n" + "".join(f"::: {name}.{module}\n\n" for module in modules)
            if modules:
                yield name, (purpose.splitlines()[0], content)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where the site has what they lead to in the repository."""
    source = {uri: name for name, uri in SITE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def on_the_site(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = SITE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri):
            return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"
        if not (ROOT / path).exists():
            raise PluginError(f"{source} has a link to {target}, which does not exist")
        return f"{text} (`{path}` in the repository)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", on_the_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Raise `PluginError` for a list that is one on GitHub, and not here: Markdown wants a blank line before it."""
    if lost := re.search(r"<p>(?:(?!</p>).)*?\n([-*] [^\n<]*)", html, re.DOTALL):
        raise PluginError(f"{page.file.src_uri}: put a blank line before the list that begins with {lost[1]!r}")
    return html


class Fetched(HTMLParser):
    """Collects what a browser fetches from elsewhere to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at the addresses of scripts, pictures and style sheets; a link waits for its reader."""
        named = dict(attrs)
        address = named.get("href") if tag == "link" and named.get("rel") != "canonical" else named.get("src")
        if address and re.match(r"(\w+:)?//", address):
            self.addresses.append(address)


def on_post_build(config: MkDocsConfig) -> None:
    """Raise `PluginError` if a page would fetch anything from elsewhere."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        fetched = Fetched()
        fetched.feed(page.read_text())
        if fetched.addresses:
            raise PluginError(f"{os.path.relpath(page, config.site_dir)} fetches {', '.join(fetched.addresses)}")
