"""Registers the first-party backends."""

from bilevel.hookspecs import Register, hookimpl


@hookimpl
def bilevel_backends(register: Register) -> None:
    """Register the backends of this package."""
    register("torch", "bilevel_backends.torch_backend:TorchBackend")
    register("deepspeed", "bilevel_backends.deepspeed_backend:DeepSpeedBackend")
    register("fsdp", "bilevel_backends.fsdp_backend:FSDPBackend")
