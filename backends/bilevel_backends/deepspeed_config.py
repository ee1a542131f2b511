"""What of a DeepSpeed configuration may be set here: what changes memory, speed and logs, and not the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REFUSED = {
    "optimizer": "the solver says how variables step (solver.optimizer_z)",
    "scheduler": "the solver has its own schedules (solver.lr_z)",
    "gradient_clipping": "clipping is part of the optimizer (solver.optimizer_z.clip)",
    "fp16": "losses are differences of losses here, which float16 does not survive; use backend.dtype=bfloat16",
    "bf16": "set backend.dtype=bfloat16: masters are kept for the active blocks only",
    "amp": "set backend.dtype=bfloat16",
    "torch_autocast": "set backend.dtype=bfloat16",
    "train_batch_size": "the problem decides its batches (problem.batch_size)",
    "train_micro_batch_size_per_gpu": "set backend.micro_batch_size",
    "gradient_accumulation_steps": "it follows from the batch and backend.micro_batch_size",
    "gradient_predivide_factor": "gradients are sums over the global batch, not means over processes",
    "prescale_gradients": "gradients are sums over the global batch, not means over processes",
    "compression_training": "it changes the weights behind the solver's back",
    "activation_checkpointing": "set backend.activation_checkpointing",
    "zero_optimization.stage": "set backend.zero_stage",
    "zero_optimization.offload_optimizer": "set backend.offload_optimizer",
    "zero_optimization.offload_param": "set backend.offload_parameters",
    "zero_optimization.zero_quantized_weights": "y and z would be rounded in every pass",
    "zero_optimization.zero_quantized_nontrainable_weights": "frozen blocks would not stay what they are",
    "zero_optimization.zero_quantized_gradients": "gradients would be rounded",
    "zero_optimization.zero_hpz_partition_size": "secondary copies of the weights would not follow our updates",
}
"""Keys that would change the result, and what to set instead."""
UNKNOWN = "it is not known to leave the result as it is"
"""Why every other key is refused that is not among those below."""

SIZES = {
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "reduce_bucket_size",
    "allgather_bucket_size", "sub_group_size",
}  # fmt: skip
"""Keys of `zero_optimization` that are counts of numbers."""
SWITCHES = {
    "allgather_partitions", "allgather_sequential", "contiguous_gradients", "elastic_checkpoint", "ignore_unused_parameters",
    "load_from_fp32_weights", "log_trace_cache_warnings", "overlap_comm", "reduce_scatter", "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
}  # fmt: skip
"""Keys of `zero_optimization` that are true or false."""
LOGGING = {
    "comms_logger", "csv_monitor", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print", "tensorboard",
    "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
}  # fmt: skip
"""Other keys of the configuration that may be set."""


def read_config(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a DeepSpeed configuration: a JSON file, or the same as a mapping.

    "auto", which asks whoever calls DeepSpeed to decide, is left to this backend, which decides what it would refuse, and
    otherwise to DeepSpeed's own default. So is a section that is not enabled.

    Raises `ValueError`, naming the key, for what cannot be set here, and for a value that DeepSpeed would not take.
    """
    config = _without_auto(_load(given) if isinstance(given, str) else dict(given))
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ValueError(f"config: zero_optimization must be a mapping, not {zero!r}")
    for key in config.keys() - LOGGING - {"zero_optimization"}:
        raise ValueError(f"config: {key} cannot be set here: {REFUSED.get(key, UNKNOWN)}")
    for key, value in zero.items():
        where = f"zero_optimization.{key}"
        if key not in SIZES | SWITCHES:
            raise ValueError(f"config: {where} cannot be set here: {REFUSED.get(where, UNKNOWN)}")
        if key in SWITCHES and not isinstance(value, bool):
            raise ValueError(f"config: {where} must be true or false, not {value!r}")
        if key in SIZES and not _is_count(value):
            raise ValueError(f"config: {where} must be a whole number, at least 0, not {value!r}")
    return config


def _is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 0. JSON has 5e8 as a float."""
    return (isinstance(value, int) and not isinstance(value, bool) and value >= 0) or (
        isinstance(value, float) and value.is_integer() and value >= 0
    )


def _load(name: str) -> dict[str, Any]:
    file = Path(name)
    try:
        given = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config: the DeepSpeed configuration {file} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"config: the DeepSpeed configuration {file} must be a JSON object")
    return given


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section without keys that say "auto", sections that nothing is left of, and sections that are not enabled."""
    kept = {}
    for key, value in section.items():
        if value == "auto" or (isinstance(value, Mapping) and value.get("enabled") in (False, "auto")):
            continue
        inner = _without_auto(value) if isinstance(value, Mapping) else value
        if inner or not value:
            kept[key] = inner
    return kept
