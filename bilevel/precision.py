"""The precision of parameters, under the names that people use for it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

SPELLINGS: Mapping[str, str] = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "single": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}


def spelled_out(precision: Any) -> Any:
    """The name that torch gives a precision, for bf16, fp32, torch.bfloat16 and the like; anything else as it is."""
    name = str(precision).removeprefix("torch.").lower()
    return SPELLINGS.get(name, name if name in SPELLINGS.values() else precision)


def trainable(precision: Any) -> Any:
    """Spelled out. Raises `ValueError` for float16: the gap between two losses drowns in its rounding, or overflows."""
    name = spelled_out(precision)
    if name == "float16":
        raise ValueError("float16 does not survive differences of losses; bfloat16 takes as much memory")
    return name


Precision = Annotated[Literal["float32", "bfloat16", "float64"], BeforeValidator(trainable)]
"""The precision in which variables are trained."""
