"""What a shell completes: names of installed parts, and keys of a recipe. Nothing heavy is loaded for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bilevel.errors import InputError
from bilevel.plain import flatten
from bilevel.plugins import load_plugins
from bilevel.recipe import Recipe


def names_of(*kinds: str) -> Callable[[str], list[str]]:
    """Completes the names of parts of these kinds; of all but commands, if none is given."""

    def complete(incomplete: str) -> list[str]:
        parts = load_plugins().parts
        wanted = kinds or [kind for kind in parts if kind != "commands"]
        return sorted({name for kind in wanted for name in parts.get(kind, ()) if name.startswith(incomplete)})

    return complete


def keys_of_recipe(ctx: Any, incomplete: str) -> list[str]:
    """Completes the keys that the recipe on the command line has, each with its present value."""
    for word in map(str, [ctx.params.get("recipe"), *ctx.args]):
        file = Path(word) / "recipe.yaml" if Path(word).is_dir() else Path(word)
        if file.suffix in (".yaml", ".yml") and file.is_file():
            with suppress(InputError):
                tree = flatten(Recipe.read(file).tree)
                return [
                    f"{key}={'' if value is None else value}" for key, value in tree.items() if key.startswith(incomplete)
                ]
    return []
