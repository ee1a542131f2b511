"""The command line. No logic: it parses, calls, prints, and turns errors into exit codes (0 done, 1 failed, 2 bad input)."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.logging import RichHandler
from rich.table import Column, Table
from typer.core import TyperGroup

from bilevel.command import prepared
from bilevel.completion import keys_of_recipe, names_of
from bilevel.errors import BilevelError, InputError, RunError
from bilevel.launch import launched, local_rank, rank
from bilevel.terminal import Terminal

if TYPE_CHECKING:
    from bilevel.plugins import Part

INTERRUPTED = 130  # as shells report a program that Ctrl-C ended
SPINS = "10000"  # some ten microseconds: long enough for the next operation of a quiet machine to begin


class Commands(TyperGroup):
    """The commands below, and those that plugins register; these are loaded when they are named or listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the core's commands, then those of the plugins' commands."""
        return [*super().list_commands(ctx), *sorted(_plugin_commands())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in _plugin_commands():
            return own
        holder = typer.Typer(add_completion=False)
        holder.command(cmd_name)(prepared(_plugin_commands()[cmd_name].load()))
        return typer.main.get_command(holder)


app = typer.Typer(
    cls=Commands,
    help="Learn how much weight each training-data source deserves, and solve other bilevel problems.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
errors = Terminal(stderr=True)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bilevel {version('bilevel')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


def command(name: str | None = None, *, reads_models: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; see `bilevel.command.prepared`."""
    return lambda function: app.command(name)(prepared(function, reads_models=reads_models))


@command()
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="The recipe: a YAML file, or a Python file that defines `recipe`; with --resume, the directory of a run. "
            "(default: with --from, the recipe of that run)"
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            autocompletion=keys_of_recipe,
            help="Change a key of the recipe, e.g. solver.penalty=20.",
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="The directory of the run, in place of run.output.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run from its last checkpoint, as if it had never stopped.")
    ] = False,
    warm_start: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Begin a new run from the last state of this one, as far as it fits."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Load and check everything, take a few steps, say what to expect, and write nothing."
        ),
    ] = False,
) -> None:
    """Run a recipe: solve its bilevel problem, and write what was learned to the run's directory."""
    from bilevel.config import load_config, read_recipe
    from bilevel.dry_run import rehearse
    from bilevel.plugins import load_plugins
    from bilevel.working_directory import entered

    if warm_start is not None:
        if resume:
            raise InputError("--from begins a new run, and --resume goes on with one; give one of them")
        recipe = recipe or warm_start / "recipe.yaml"
    if recipe is None:
        raise InputError("name a recipe, or a run by --from RUN or --resume RUN")
    is_run = recipe.is_dir()
    if is_run and not resume:
        raise InputError(
            f"{recipe} is a directory, and a recipe is a file; continue the run in it with --resume, or begin another one "
            f"like it by {recipe / 'recipe.yaml'} and an --output of its own"
        )
    if is_run and output is not None:
        raise InputError(f"--output {output}: the run in {recipe} is resumed where it is; leave out --output")
    with entered(recipe) as place:
        plugins = load_plugins()
        where = str(place.path(Path(output))) if output is not None else str(place.run) if is_run else None
        given = read_recipe(place.recipe, changes=changes or [], output=where)
        if warm_start is not None:
            given.put("run.warm_start", str(place.path(warm_start)), f"--from {warm_start}")
        config = load_config(given, plugins)
        if dry_run:
            expected = rehearse(config, resume=resume)
            if rank() == 0:
                Terminal().print(expected)
        else:
            config.fit(resume=resume, observer=plugins.hooks)


@command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe. Its model's config.json is read, its data are not.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", autocompletion=keys_of_recipe, help="Change a key of the recipe."),
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Plan for this machine: its GPU, or else its CPU, as measured in a few seconds.")
    ] = False,
    gpus: Annotated[int, typer.Option(help="The number of GPUs; each has a process of its own.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="The memory of each GPU in GB (10^9 bytes).")] = 80.0,
    cpu_memory: Annotated[
        float | None, typer.Option(help="The memory of each machine in GB. It is not checked if this is not given.")
    ] = None,
    labelled_share: Annotated[
        float, typer.Option(help="The share of each row, such as of its tokens, that carries a loss.")
    ] = 1.0,
    mfu: Annotated[float, typer.Option(help="The share of the peak throughput that is reached.")] = 0.4,
    peak_tflops: Annotated[
        float, typer.Option(help="The peak throughput of one GPU in TFLOP/s; 989 is bfloat16 on an H100.")
    ] = 989.0,
    link: Annotated[
        float, typer.Option(help="The bus bandwidth inside a machine in GB/s, as nccl-tests report it (busbw).")
    ] = 300.0,
    node_link: Annotated[float, typer.Option(help="The same for collectives over several machines, for each GPU.")] = 45.0,
    gpus_per_node: Annotated[int, typer.Option(help="The number of GPUs in a machine.")] = 8,
    json: Annotated[Path | None, typer.Option(help="A file to write all numbers to, as JSON.")] = None,
) -> None:
    """Predict the memory and the time that a recipe takes, before it runs. The exit code is 1 if it does not fit."""
    from bilevel.config import load_config
    from bilevel.files import write_atomic
    from bilevel.plan_report import plan_run
    from bilevel.planning.hardware import Hardware
    from bilevel.plugins import load_plugins

    hardware = Hardware(gpus, gpu_memory, cpu_memory, peak_tflops, mfu, link, node_link, gpus_per_node)
    if here and hardware != Hardware():
        raise InputError("--here measures this machine, and other options describe one; leave out either")
    config = load_config(recipe, load_plugins(), changes=changes or [])
    report = plan_run(config, None if here else hardware, labelled_share=labelled_share)
    Terminal(width=None if sys.stdout.isatty() else 160).print(report)
    if json is not None:
        write_atomic(json, report.to_json())
    if not report.plan.fits:
        raise typer.Exit(1)


@command("list", reads_models=False)
def list_parts() -> None:
    """List everything that is installed, by kind, and the plugins that are broken with the reason."""
    from bilevel.plugins import load_plugins

    plugins = load_plugins()
    table = Table("kind", "name", "plugin", Column("class", overflow="fold"), box=None, header_style="bold", pad_edge=False)
    for kind, parts in plugins.parts.items():
        for part in sorted(parts.values(), key=lambda part: part.name):
            table.add_row(kind[:-1], part.name, part.plugin, part.target)
    Terminal(width=None if sys.stdout.isatty() else 200).print(table)  # a pipe has no width to wrap at
    for plugin, reason in plugins.broken.items():
        errors.print(f"broken plugin {plugin!r}: {reason}", style="red", soft_wrap=True)


@command(reads_models=False)
def describe(
    name: Annotated[
        str, typer.Argument(help="A name that `bilevel list` shows, a rule for active, or run.", autocompletion=names_of())
    ],
) -> None:
    """Say what a part of a recipe is, and what can be set: keys, defaults and meanings."""
    from bilevel.describe import describe
    from bilevel.plugins import load_plugins

    Terminal(width=None if sys.stdout.isatty() else 120).print(describe(name, load_plugins()))


@command(reads_models=False)
def schema(
    output: Annotated[Path | None, typer.Option(help="The file to write. (default: print)")] = None,
) -> None:
    """Write the JSON schema of a recipe, by which editors complete keys and check values."""
    from bilevel.files import write_atomic
    from bilevel.plugins import load_plugins
    from bilevel.schema import schema_text

    text = schema_text(load_plugins())
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(output, text)


@command()
def check(
    what: Annotated[
        str,
        typer.Argument(
            help="The name of a problem, solver or backend, or a recipe, whose problem is checked.",
            autocompletion=names_of("problems", "solvers", "backends"),
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", autocompletion=keys_of_recipe, help="Change a key of the recipe."),
    ] = None,
) -> None:
    """Check that a problem, solver or backend does what the rest of the package relies on. For authors of plugins."""
    from bilevel.testing.check import check
    from bilevel.testing.contract import ContractError

    try:
        print(f"{check(what, changes or [])} keeps the contract")
    except ContractError as error:
        raise RunError(f"{what}: {error}") from error


@command(reads_models=False)
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CLAIM]...", autocompletion=names_of("checks"), help="The claims to measure; all by default."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure fewer points, which is less sharp and takes half the time.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="A file to write all measurements to, as JSON.")] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            autocompletion=names_of("solvers"),
            help="The solver to measure, on the claims that are about every penalty method.",
        ),
    ] = None,
    picture: Annotated[Path, typer.Option(help="The file to draw the fits to, as PNG.")] = Path("verify.png"),
) -> None:
    """Measure whether the solvers behave as the theory says."""
    from bilevel.verify.run import verify, write

    report = verify(names or [], quick=quick, solver=solver)
    terminal = Terminal(width=None if sys.stdout.isatty() else 80)
    terminal.print(report.table())
    terminal.print(report.summary())
    write(report, picture=picture, data=json)
    if not report.holds:
        raise RunError(
            f"these claims do not hold: {', '.join(report.failed)}" if report.failed else "no claim could be measured"
        )


@command(reads_models=False)
def new(
    kind: Annotated[str, typer.Argument(help="problem, solver, check or another kind with a template in `bilevel list`.")],
    name: Annotated[str, typer.Argument(help="The name of the part, such as my-solver. The package is bilevel-NAME.")],
    into: Annotated[Path | None, typer.Option(help="The directory to write, which must not exist.")] = None,
) -> None:
    """Write a package with a part of your own, which passes its tests as it is. For authors of plugins."""
    from bilevel.new.write import new
    from bilevel.plugins import load_plugins

    directory = new(kind, name, load_plugins(), into=into)
    Terminal(soft_wrap=True).print(f"written to {directory}; next: pip install -e '{directory}[dev]' && pytest {directory}")


@command(reads_models=False)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The directories of runs and of comparisons to show.")
    ],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A directory to write the charts to as well, as PNG.")
    ] = None,
) -> None:
    """Show runs, and how methods compare, as one HTML file."""
    from bilevel.report.page import check_output, read, write

    check_output(output, png)
    for file in write(read(runs), output=output, pictures=png):
        Terminal(soft_wrap=True).print(f"written to {file}")


def _plugin_commands() -> dict[str, Part]:
    from bilevel.plugins import load_plugins

    return load_plugins().parts["commands"]


def main() -> None:
    """Entry point of the command `bilevel`. Of several processes on a machine, only the first one prints."""
    _shorten_waits()
    speaks = local_rank() == 0
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_time=False, show_path=False)],
    )
    logging.getLogger("bilevel").setLevel(logging.INFO if speaks else logging.ERROR)
    # transformers imports DeepSpeed where it is installed, which then warns every user of a CPU that there is no GPU
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        app()
    except InputError as error:
        if speaks:
            errors.print(f"error: {error}", style="red", soft_wrap=True)
        _leave(2)
    except BilevelError as error:
        from bilevel.loop import Interrupted

        interrupted = isinstance(error, Interrupted)
        if speaks:
            errors.print(f"{error}", style="yellow" if interrupted else "red", soft_wrap=True)
        _leave(INTERRUPTED if interrupted else 1)
    except OSError as error:  # a full disk, a read-only one, a path below a file, a name that is too long
        if error.errno is None:
            raise
        if speaks:
            where = f"{error.filename2 or error.filename}: " if error.filename is not None else ""
            errors.print(f"error: {where}{error.strerror}", markup=False, style="red", soft_wrap=True)
        _leave(1)
    except Exception:
        if not launched():
            raise
        errors.print(f"process {rank()} failed:\n{traceback.format_exc()}", soft_wrap=True)
        _leave(1)
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else int(end.code is not None))


def _shorten_waits() -> None:
    """Let a thread of OpenMP that waits for others leave its core soon, unless the user has settled how it waits.

    By default, the OpenMP of torch's wheels (libgomp) spins for milliseconds, which is most of all time where other programs
    need the cores too. It reads this when torch is loaded. `benchmarks/waiting.py` measures it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _leave(code: int) -> NoReturn:
    """End this process. One of several exits at once, since cleaning up might wait for processes that wait for it."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
