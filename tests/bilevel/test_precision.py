"""The precision of parameters is understood under all its usual names."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from bilevel import InputError
from bilevel.precision import Precision
from bilevel_backends.torch_backend import TorchBackend


@pytest.mark.parametrize(
    ("given", "expected"),
    [("bf16", "bfloat16"), ("BF16", "bfloat16"), ("fp32", "float32"), ("float", "float32"), ("double", "float64"),
     ("float64", "float64"), ("torch.bfloat16", "bfloat16"), (torch.float32, "float32")],
)  # fmt: skip
def test_a_precision_has_many_names_and_one_in_the_resolved_recipe(given, expected):
    assert TypeAdapter(Precision).validate_python(given) == expected
    assert TorchBackend(dtype=given).dtype == expected


@pytest.mark.parametrize("given", ["fp16", "half", "float16", torch.float16])
def test_float16_is_refused_with_the_reason(given):
    for build in (TypeAdapter(Precision).validate_python, lambda dtype: TorchBackend(dtype=dtype)):
        with pytest.raises(
            (ValueError, InputError), match="float16 does not survive differences of losses; bfloat16 takes as much"
        ):
            build(given)


@pytest.mark.parametrize("given", ["int8", "bf 16", 16, True])
def test_what_is_no_precision_is_refused(given):
    with pytest.raises(ValidationError, match="Input should be 'float32', 'bfloat16' or 'float64'"):
        TypeAdapter(Precision).validate_python(given)
