"""What `bilevel new` writes for the kinds of parts of this package."""

from bilevel.new.template import Template

BASELINE = Template(
    "bilevel_baselines",
    "bilevel_llm.templates",
    "baseline",
    "It weighs the sources between equally and by their number of rows.",
    ("bilevel baseline {name} recipe.yaml    # a recipe of yours, with the problem llm-reweighting",),
    ("bilevel[llm]",),
)
