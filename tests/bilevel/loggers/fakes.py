"""Packages that log runs, as far as our loggers use them: they keep in memory what they are given."""

from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


def fake_wandb(*, fails: str = "") -> Any:
    """`wandb`, of which `runs` has what was made. `fails` is the error with which nobody can log in."""
    runs: list[Any] = []

    class UsageError(Exception):
        pass

    class CommError(Exception):
        pass

    errors = {"UsageError": UsageError, "CommError": CommError}

    class Run:
        def __init__(self, settings: dict[str, Any]) -> None:
            self.settings, self.id = settings, settings["id"]
            self.step = max((step + 1 for run in runs if run.id == self.id for step, _ in run.logged), default=0)
            self.logged: list[tuple[int, dict[str, float]]] = []
            self.summary: dict[str, Any] = {}
            self.files: dict[str, bytes] = {}
            self.exit_code: int | None = None

        def log(self, numbers: dict[str, float], step: int) -> None:
            self.logged.append((step, numbers))

        def log_artifact(self, artifact: Any) -> None:
            self.files = artifact.files

        def finish(self, exit_code: int) -> None:
            self.exit_code = exit_code

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.files: dict[str, bytes] = {}

        def add_file(self, path: str) -> None:
            self.files[Path(path).name] = Path(path).read_bytes()

    def init(**settings: Any) -> Run:
        runs.append(run := Run(settings))
        return run

    def login() -> bool:
        if fails:
            raise errors[fails]("No API key configured.")
        return True

    return package("wandb", runs=runs, init=init, login=login, Artifact=Artifact, Settings=SimpleNamespace, **errors)


def package(name: str, **members: Any) -> Any:
    """A module that can be found and imported once it is in `sys.modules`."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="fake")
    vars(module).update(members)
    return module
