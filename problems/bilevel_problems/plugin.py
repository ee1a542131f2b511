"""Registers the first-party problems, the ways to weigh their data, and commands."""

from bilevel.hookspecs import Register, hookimpl


@hookimpl
def bilevel_problems(register: Register) -> None:
    """The problems of this package."""
    register("llm-reweighting", "bilevel_problems.llm.reweighting:LLMReweighting")
    register("llm-finetuning", "bilevel_problems.llm.finetuning:FineTuning")
    register("quadratic", "bilevel_problems.synthetic.quadratic:Quadratic")
    register("cubic-bias", "bilevel_problems.synthetic.cubic_bias:CubicBias")
    register("logistic-regularisation", "bilevel_problems.synthetic.logistic_regularisation:LogisticRegularisation")
    register("ridge-reweighting", "bilevel_problems.synthetic.ridge_reweighting:RidgeReweighting")
    register("hyper-cleaning", "bilevel_problems.synthetic.hyper_cleaning:HyperCleaning")


@hookimpl
def bilevel_features(register: Register) -> None:
    """The features of this package."""
    register("length", "bilevel_problems.llm.features:length")
    register("hashed-words", "bilevel_problems.llm.features:hashed_words")


@hookimpl
def bilevel_solvers(register: Register) -> None:
    """Solvers that need more of a problem than `bilevel.Problem` says: language-model data by source."""
    register("doremi", "bilevel_problems.llm.weightings.doremi:DoReMi")
    register("odm", "bilevel_problems.llm.weightings.odm:ODM")


@hookimpl
def bilevel_weightings(register: Register) -> None:
    """What learned weights are compared with."""
    register("uniform", "bilevel_problems.llm.weightings.uniform:Uniform")
    register("proportional", "bilevel_problems.llm.weightings.proportional:Proportional")
    register("temperature", "bilevel_problems.llm.weightings.temperature:Temperature")
    register("doremi", "bilevel_problems.llm.weightings.doremi:DoReMi")
    register("odm", "bilevel_problems.llm.weightings.odm:ODM")
    register("less", "bilevel_problems.llm.weightings.less:LESS")


@hookimpl
def bilevel_commands(register: Register) -> None:
    """The commands of this package."""
    register("mix", "bilevel_problems.llm.commands.mix:mix")
    register("export-weights", "bilevel_problems.llm.commands.export_weights:export_weights")
    register("finetune", "bilevel_problems.llm.commands.finetune:finetune")
    register("export", "bilevel_problems.llm.commands.export:export")
    register("evaluate", "bilevel_problems.llm.commands.evaluate:evaluate")
    register("weigh", "bilevel_problems.llm.weigh:weigh")
    register("compare", "bilevel_problems.llm.commands.compare:compare")
