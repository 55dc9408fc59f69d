"""The model that `from_pretrained` would load, on the meta device: without weights, but with its quantized layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype
from transformers.quantizers import AutoHfQuantizer

from toolkit.errors import UserError
from toolkit.models.arguments import FLASH_ATTENTION
from toolkit.seams import patched


def model_on_meta(
    auto_class: Any,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """The result of `auto_class.from_pretrained(..., config=config, dtype=dtype, ...)`, with the same shapes and layers.

    Quantized layers are those of `quantization_config`, whatever `config` says of how its checkpoint is stored.

    Modules that the architecture keeps in float32 are float32, as after loading. The weights of quantized layers are not yet
    packed: `fake.make_fake` packs them.

    Raises: UserError for a quantization method other than that of bitsandbytes.
    """
    kwargs: dict[str, Any] = {"trust_remote_code": False}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    quantizer = None
    if quantization_config is not None:
        quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
        method = getattr(quantization_config.quant_method, "value", quantization_config.quant_method)
        if method != "bitsandbytes":
            raise UserError(f"memory is predicted for bitsandbytes' 4-bit and 8-bit weights, not for {method}")
        dtype = quantizer.update_dtype(dtype)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype, **kwargs)
        if quantizer is not None:
            with local_torch_dtype(dtype, type(model).__name__):
                quantizer.preprocess_model(model, dtype=dtype, device_map=None)
            model.hf_quantizer = quantizer
            quantizer.postprocess_model(model)
            model.tie_weights()
    _keep_in_fp32(model, dtype)
    return model.eval()


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    plan = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        wanted = next((plan[part] for part in name.split(".") if part in plan), None)
        if wanted is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted)


@contextmanager
def attention_without_its_package() -> Iterator[None]:
    """While open, models are built with FlashAttention although neither its package nor a GPU is here. They cannot compute it.

    Its implementation is then `flash_attention_2` or `flash_attention_3`, by the version that runs.

    Raises: UserError, when a model is built that does not support it.
    """
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def checked(model: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        version = FLASH_ATTENTION.get(attn_implementation or "")
        if version is None:
            return check(model, attn_implementation, *args, **kwargs)
        flag, kind = f"--attn_implementation {attn_implementation}", model.config.model_type
        if not model._supports_flash_attn:
            raise UserError(f"{flag}: transformers has no FlashAttention for {kind} models; leave it out")
        own = [name for name in model._compatible_flash_implementations or () if name in FLASH_ATTENTION]
        if own and version not in map(FLASH_ATTENTION.get, own):
            raise UserError(f"{flag}: {kind} models only run with {' or '.join(own)}; give it, or leave the flag out")
        return f"flash_attention_{version}"

    with patched("PreTrainedModel._check_and_adjust_attn_implementation", checked):
        yield
