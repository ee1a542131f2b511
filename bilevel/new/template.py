"""What a kind of part brings so that `bilevel new` can write a package with one of it; and the kinds of the core."""

from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable


@dataclass(frozen=True)
class Template:
    """A package with one part, as jinja templates.

    hook: the hook that registers the part: "bilevel_problems".
    package, folder: where the templates are, as package data: `part.py.jinja` and `test.py.jinja`, and `recipe.yaml.jinja`
        if there is something to run. They are given `name`, `module` and `Class`, the names of the part.
    about: what the part does as it is written, for the README; a sentence.
    commands: what can be done with it once it is installed, for the README; `{name}` is its name.
    requires: what the package depends on.
    """

    hook: str
    package: str
    folder: str
    about: str
    commands: tuple[str, ...]
    requires: tuple[str, ...] = ("bilevel",)

    @property
    def files(self) -> Traversable:
        """The folder of the templates."""
        return files(self.package).joinpath(self.folder)


PROBLEM = Template(
    "bilevel_problems",
    "bilevel.new",
    "templates/problem",
    "It calibrates a sensor, with a solution in closed form, so you can see that the answer is right: the offset of the "
    "recipe ends at (4 - 2) / (1 + 0.25) = 1.6.",
    ("bilevel check {name}", "bilevel run recipe.yaml"),
)
SOLVER = Template(
    "bilevel_solvers",
    "bilevel.new",
    "templates/solver",
    "It descends on the penalty function of a bilevel problem in a single loop.",
    ("bilevel check {name}", "bilevel verify --solver {name}"),
)
CHECK = Template(
    "bilevel_checks",
    "bilevel.new",
    "templates/check",
    "It measures on a quadratic how the distance of the penalized lower solution falls with the penalty.",
    ("bilevel verify {name}",),
)
