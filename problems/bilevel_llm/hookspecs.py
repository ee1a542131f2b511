"""The kinds of parts that this package adds; any plugin can register parts of them."""

from bilevel.hookspecs import Register, hookspec


@hookspec
def bilevel_baselines(register: Register) -> None:
    """Register ways to weigh or select training data: subclasses of `bilevel_llm.baselines.base.Baseline`."""


@hookspec
def bilevel_formats(register: Register) -> None:
    """Register formats of data files: subclasses of `bilevel_llm.data.format.Format`."""


@hookspec
def bilevel_exporters(register: Register) -> None:
    """Register ways to write learned weights for a trainer: subclasses of `bilevel_llm.exporters.exporter.Exporter`."""


@hookspec
def bilevel_features(register: Register) -> None:
    """Register functions that describe rows of text by numbers, for a scorer of rows (see `llm-reweighting`)."""


@hookspec
def bilevel_findings(register: Register) -> None:
    """Register kinds of findings about learned weights: functions of a `bilevel_llm.reweighting.trust.Trust`.

    A function returns what it has to say about the run, a sequence of `bilevel.Finding`, which may be empty. It is called
    for runs of a solver that reports a penalty gap for each source, after at least eight steps that moved the weights.
    """
