"""What a logger is: its settings, which a recipe has under `run.loggers`, and what follows a run by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

from bilevel.checked import Checked
from bilevel.errors import InputError
from bilevel.plain import RECIPE_RULES


@dataclass(frozen=True)
class Logger(Checked):
    """Passes a run on to a service or a file of its own. Subclasses are frozen dataclasses: the fields are the settings.

    A subclass has the field `name: Literal["my-logger"] = "my-logger"`, with the name under which it is registered. It has
    hooks marked `@hookimpl`, as a plugin has them: `bilevel_run_start`, `bilevel_step_end`, `bilevel_run_end`, each with the
    arguments that it needs. If something is to be remembered from one to the next, `follower` returns a new object that
    has the hooks.

    Hooks are called in the first process, in a thread of their own, one after another, so that nothing waits for them before
    the end of the run: `run.history` may be further than the `record` of a step. What they raise is a warning; none but
    `bilevel_run_end` is called after it.

    requires: package -> what pip is to install where it is missing.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    requires: ClassVar[Mapping[str, str]] = {}

    def check(self) -> None:
        """Raise `InputError` for what has to be put right before a run. It is called before anything is loaded or trained.

        Packages are imported here, in the main thread: threads that import at once see each other's half-made modules.
        """
        for package, installed in self.requires.items():
            found = find_spec(package)
            if found is None or found.origin is None:  # a folder of that name, where Python looks first, is not the package
                raise InputError(f"{package} is not installed: pip install '{installed}'")
            try:
                import_module(package)
            except Exception as error:
                raise InputError(
                    f"{package} is installed, but cannot be imported: {type(error).__name__}: {error}"
                ) from error

    def follower(self) -> object:
        """The object whose hooks follow one run."""
        return self
