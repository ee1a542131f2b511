"""A base in 4 bits below adapters (Dettmers et al., "QLoRA", NeurIPS 2023, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bilevel import InputError

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: 4 bits, a byte as the scale of 64 of them, and 4 bytes as that of 256 scales."""


def require_bitsandbytes() -> None:
    """Raise `InputError` if bitsandbytes is missing or cannot be used."""
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # its libraries are loaded, and may not fit the machine
        raise InputError(
            f"problem.lora.quantize needs the package bitsandbytes ({error}): pip install 'bilevel[quantized]'"
        ) from error


def how_to_load() -> dict[str, Any]:
    """Settings of `from_pretrained`: linear layers but the head in NF4 with quantized scales, on this process's GPU."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return {"quantization_config": config, "device_map": {"": device}}


def keep_weights_as_they_are(model: nn.Module) -> None:
    """Let every layer compute in the precision of what it is given, and never repack its weights, which replicas share.

    On some CPUs bitsandbytes would do that at the first pass without gradients.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_type_is_set = False
            layer.support_avx512bf16_for_cpu = False


def bytes_in_4_bits(model: Any) -> dict[str, float]:
    """The parameters of a dense `LanguageModel` that would be quantized -> the bytes that each would then take."""
    head = model.get_output_embeddings()
    layers = {path: part for path, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}
    return {
        f"{path}.weight": BYTES * layer.weight.numel() for path, layer in layers.items() if not layer.weight.requires_grad
    }
