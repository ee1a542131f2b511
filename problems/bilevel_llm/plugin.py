"""Registers the language-model problems, baselines, formats of data, exporters, features, findings and commands."""

from bilevel.hookspecs import Register, hookimpl


@hookimpl
def bilevel_kinds() -> str:
    """Baselines, formats, exporters, features and findings are kinds of parts that this package adds."""
    return "bilevel_llm.hookspecs"


@hookimpl
def bilevel_problems(register: Register) -> None:
    """The problems of this package."""
    register("llm-reweighting", "bilevel_llm.reweighting.problem:LLMReweighting")
    register("llm-finetuning", "bilevel_llm.finetuning.problem:FineTuning")


@hookimpl
def bilevel_formats(register: Register) -> None:
    """The formats of data files that this package reads."""
    register("messages", "bilevel_llm.data.formats.messages:Messages")
    register("sharegpt", "bilevel_llm.data.formats.sharegpt:ShareGPT")
    register("alpaca", "bilevel_llm.data.formats.alpaca:Alpaca")
    register("prompt_completion", "bilevel_llm.data.formats.prompt_completion:PromptCompletion")
    register("text", "bilevel_llm.data.formats.text:Text")


@hookimpl
def bilevel_exporters(register: Register) -> None:
    """The trainers that this package writes weights for, and the weights alone."""
    register("interleave", "bilevel_llm.exporters.interleave:Interleave")
    register("llamafactory", "bilevel_llm.exporters.llamafactory:LlamaFactory")
    register("trl", "bilevel_llm.exporters.trl:TRL")
    register("axolotl", "bilevel_llm.exporters.axolotl:Axolotl")
    register("megatron", "bilevel_llm.exporters.megatron:Megatron")
    register("json", "bilevel_llm.exporters.plain:JsonWeights")
    register("csv", "bilevel_llm.exporters.plain:CsvWeights")


@hookimpl
def bilevel_features(register: Register) -> None:
    """The features of this package."""
    register("length", "bilevel_llm.data.features:length")
    register("hashed-words", "bilevel_llm.data.features:hashed_words")


@hookimpl
def bilevel_solvers(register: Register) -> None:
    """Solvers that need more of a problem than `bilevel.Problem` says: language-model data by source."""
    register("doremi", "bilevel_llm.baselines.doremi:DoReMi")
    register("odm", "bilevel_llm.baselines.odm:ODM")


@hookimpl
def bilevel_baselines(register: Register) -> None:
    """What learned weights are compared with."""
    register("uniform", "bilevel_llm.baselines.uniform:Uniform")
    register("proportional", "bilevel_llm.baselines.proportional:Proportional")
    register("temperature", "bilevel_llm.baselines.temperature:Temperature")
    register("doremi", "bilevel_llm.baselines.doremi:DoReMi")
    register("odm", "bilevel_llm.baselines.odm:ODM")
    register("less", "bilevel_llm.baselines.less:LESS")
    register("swarm", "bilevel_llm.baselines.swarm:Swarm")


@hookimpl
def bilevel_findings(register: Register) -> None:
    """What a careful reader should know of learned weights, in the order in which it is said."""
    register("evidence", "bilevel_llm.reweighting.findings.evidence:evidence")
    register("learning", "bilevel_llm.reweighting.findings.learning:learning")
    register("still-moving", "bilevel_llm.reweighting.findings.still_moving:still_moving")
    register("penalty-gap", "bilevel_llm.reweighting.findings.penalty_gap:penalty_gap")
    register("order", "bilevel_llm.reweighting.findings.order:order")
    register("one-source", "bilevel_llm.reweighting.findings.one_source:one_source")
    register("rows", "bilevel_llm.reweighting.findings.rows:rows")


@hookimpl
def bilevel_commands(register: Register) -> None:
    """The commands of this package."""
    register("init", "bilevel_llm.commands.init:init")
    register("mix", "bilevel_llm.commands.mix:mix")
    register("targets", "bilevel_llm.commands.targets:targets")
    register("export-weights", "bilevel_llm.commands.export_weights:export_weights")
    register("finetune", "bilevel_llm.commands.finetune:finetune")
    register("export-model", "bilevel_llm.commands.export_model:export_model")
    register("evaluate", "bilevel_llm.commands.evaluate:evaluate")
    register("baseline", "bilevel_llm.commands.baseline:baseline")
    register("compare", "bilevel_llm.commands.compare:compare")


@hookimpl
def bilevel_functions(register: Register) -> None:
    """What Python users find as `bilevel.NAME`."""
    register("reweight", "bilevel_llm.api.reweight:reweight")
    register("load_reweighting", "bilevel_llm.api.reweight:load_reweighting")
    register("Reweighting", "bilevel_llm.api.reweighting:Reweighting")


@hookimpl
def bilevel_templates(register: Register) -> None:
    """What `bilevel new` writes for the kinds of this package."""
    register("baseline", "bilevel_llm.templates:BASELINE")
