"""LoRA: trains two low-rank matrices for each target weight, and freezes the weight itself; flags select its variants."""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer, dora
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS_CHOICE
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from toolkit.console import say
from toolkit.errors import UserError
from toolkit.methods.base import EMBEDDED, PeftBased, check_least, left_out, say_in_run, targets_of, task_type
from toolkit.models.quantization import stacked_experts
from toolkit.seams import patched

# Initializations that subtract the adapter's initial product from the base. Such an adapter only works on a base that was
# altered in the same way.
ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
INITS = "default, gaussian, orthogonal, olora, pissa or pissa_niter_N (N up to 999)"


@dataclass
class Lora(PeftBased):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W x + (alpha / r) B A x, with A (r, in) and B (out, r).

    Trains r x (in + out) parameters for each target instead of in x out, so gradients and optimizer state become very
    small. Activations do not: the gradient still passes through the whole frozen model.
    """

    _argument_group_name: ClassVar[str] = "LoRA"
    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv:2106.09685"
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 3e-4}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {
        "learning_rate": 5e-3,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
    }

    lora_r: int = field(default=16, metadata={"help": "Rank: trainable parameters and adapter size grow with it."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: the update is multiplied by alpha / r."})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout before A; each target then keeps a mask and an input of its own."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, or all-linear. Default: PEFT's choice for the architecture, else all linear layers."
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Scale by alpha / sqrt(r), so that high ranks learn as fast as low ones (arXiv:2312.03732)."},
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "DoRA: train the weights' magnitude and direction separately (arXiv:2402.09353); slower, and it keeps "
            "a merged weight of each target among the activations."
        },
    )
    init_lora_weights: str = field(
        default="default",
        metadata={
            "help": f"{INITS}. PiSSA (arXiv:2404.02948) starts from the principal singular vectors of the weight, OLoRA "
            "(arXiv:2406.01775) from its QR decomposition; niter_N: PiSSA with N iterations of a fast SVD."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+ (arXiv:2402.12354): B learns this many times faster than A; try 16."}
    )

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for an impossible rank, scale, dropout or initialization."""
        super().check(given)
        check_least(self, 1, "lora_r", "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout:g} is not possible; give a number from 0 to below 1")
        if self.use_dora and given.get("load_in_8bit"):
            raise UserError(
                "--use_dora does not go with --load_in_8bit: PEFT loses the scales of 8-bit weights when it takes their norm; use "
                "--load_in_4bit"
            )
        init = self.init_lora_weights
        if not re.fullmatch(r"default|gaussian|orthogonal|olora|pissa|pissa_niter_[1-9]\d{0,2}", init):
            raise UserError(f"--init_lora_weights {init} is not known; give {INITS}")
        if self.changes_base:
            if self._quantizes(given):
                raise UserError(
                    f"--init_lora_weights {init} changes the base's weights, which a quantized base does not allow; "
                    "leave one of them out"
                )
            if self.use_dora:
                raise UserError(f"--use_dora and --init_lora_weights {init} exclude each other; give one of them")
        if init == "orthogonal" and self.lora_r % 2:
            raise UserError(f"--init_lora_weights orthogonal needs an even --lora_r, got {self.lora_r}")
        if self.loraplus_lr_ratio is not None and self.loraplus_lr_ratio < 1:
            raise UserError(f"--loraplus_lr_ratio {self.loraplus_lr_ratio:g} is not possible; give at least 1")

    @property
    def changes_base(self) -> str:
        """PiSSA and OLoRA start from a part of the weight (its principal singular vectors, its QR decomposition) and subtract it."""
        changes = self.init_lora_weights.startswith(("pissa", "olora"))
        return f"--init_lora_weights {self.init_lora_weights}" if changes else ""

    def configure(self, model: PreTrainedModel) -> LoraConfig:
        """The configuration for PEFT. On the meta device it uses the default init, because there are no weights to start from."""
        empty = any(p.is_meta for p in model.parameters())
        init: bool | str = True if empty or self.init_lora_weights == "default" else self.init_lora_weights
        # PEFT (0.21) skips its own default targets for models with experts that it knows, so they are always named
        targets = targets_of(model, "lora_target_modules", self.lora_target_modules, PEFTS_CHOICE)
        config = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            exclude_modules=left_out(model),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=init,
            task_type=task_type(model),
        )
        if _reaches_experts(config, model):
            self._fit_experts(config, model)
        return config

    def _fit_experts(self, config: LoraConfig, model: PreTrainedModel) -> None:
        """Sets the dropout to 0: PEFT adds the product of A and B to the stacked experts, so nothing comes before A.

        Raises: UserError for a dropout that was asked for, and for variants that PEFT does not have for stacked experts.
        """
        if self.use_dora or self.init_lora_weights != "default":
            given = "--use_dora" if self.use_dora else f"--init_lora_weights {self.init_lora_weights}"
            raise UserError(
                f"{given} does not go with stacked experts, which --lora_target_modules names; leave one out"
            )
        if self.lora_dropout not in (0, Lora.lora_dropout):
            raise UserError(
                f"--lora_dropout {self.lora_dropout:g} does not go with stacked experts, which --lora_target_modules names; give 0"
            )
        if config.lora_dropout:
            config.lora_dropout = 0.0
            say_in_run(
                model, "targets", "stacked experts are adapted too, for which PEFT has no dropout: it is 0 everywhere"
            )

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` wrapped by PEFT, with the base's weights frozen.

        Raises: UserError if a target matches no module (the message lists those that exist).
        """
        if self.changes_base and getattr(model, "is_quantized", False):
            raise UserError(f"--init_lora_weights {self.init_lora_weights} needs a base that is not quantized")
        if self.init_lora_weights == "olora" and any(type(m).__name__ == "Conv1D" for m in model.modules()):
            raise UserError("--init_lora_weights olora does not know GPT-2's Conv1D layers; give pissa or default")
        with _dora_on_meta():
            model = super().attach(model)
        share_inputs(model)
        if self.lora_target_modules == ["all-linear"] and not any(p.is_meta for p in model.parameters()):
            _say_left_out(model)
        if self.changes_base and not any(p.is_meta for p in model.parameters()):
            # On the host, and not in a dictionary: the memory census would count a dictionary's tensors as the model's.
            model.initial_adapter = tuple(
                (k, v.detach().cpu().clone()) for k, v in get_peft_model_state_dict(model).items()
            )
        return model

    @property
    def learning_rates_flag(self) -> str:
        """The flag of LoRA+, which has two learning rates."""
        return "" if self.loraplus_lr_ratio is None else "--loraplus_lr_ratio"

    def make_optimizer(
        self, model: PreTrainedModel, args: TrainingArguments, kind: type[Optimizer], options: dict[str, Any]
    ) -> Optimizer | None:
        """For LoRA+, an optimizer whose parameter groups for B have a higher learning rate."""
        if self.loraplus_lr_ratio is None:
            return None
        own = {"loraplus_weight_decay": args.weight_decay, "loraplus_lr_ratio": self.loraplus_lr_ratio}
        return create_loraplus_optimizer(model, kind, **options, **own)

    def finish_saving(self, model: PreTrainedModel, folder: Path) -> None:
        """Rewrites the adapter for the original base, if PiSSA or OLoRA changed the one in memory."""
        save_over_original_base(model, folder)

    @classmethod
    def adapter_changes_base(cls, config: PeftConfig) -> bool:
        """Whether PEFT subtracts the adapter's initial product from the base."""
        return takes_from_base(config)


def share_inputs(model: nn.Module) -> None:
    """Lets A read the layer's own input under autocast, without PEFT's (0.21) cast to the type of A, which is fp32.

    Autocast casts the input back to 16 bits at once, so the product is the same, bit for bit; but each target would keep a copy of
    its own for the gradient of A, where q, k and v can keep one input together. PEFT's quantized layers do this already on GPUs.
    """
    for layer in model.modules():
        if (
            isinstance(layer, LoraLayer) and not layer.lora_variant
        ):  # DoRA computes with the weight in the type of its input
            layer._cast_input_dtype = _cast_outside_autocast


def _cast_outside_autocast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def _reaches_experts(config: LoraConfig, model: PreTrainedModel) -> bool:
    """Whether PEFT turns targets of `config` into stacked experts of `model`."""
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, model, None)
    except ValueError:  # PEFT says it again, and why, when it attaches
        return False
    return bool(converted.target_parameters)


def takes_from_base(config: PeftConfig) -> bool:
    """Whether PEFT, when it loads an adapter with `config`, subtracts the adapter's initial product from the base."""
    return str(getattr(config, "init_lora_weights", "")).startswith(ALTERS_BASE)


def _say_left_out(model: PeftModel) -> None:
    """Warns if all-linear leaves out experts: stacked tensors in architectures that PEFT does not know are not adapted."""
    left = [
        p.numel() for name, p in stacked_experts(model).items() if not re.search(r"\.experts\.(lora_|base_layer)", name)
    ]
    if left:
        share = sum(left) / sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
        say(
            "warning",
            f"all-linear leaves out the experts, {share:.0%} of the weights: they are stacked tensors in this model, not linear layers",
        )


@contextmanager
def _dora_on_meta() -> Iterator[None]:
    """Makes DoRA's magnitudes (out,) from the weight's shape for 4-bit weights on the meta device, which are not packed there."""
    plain = dora.DoraLinearLayer.update_layer

    def update_layer(self: Any, *, base_layer: torch.nn.Module, lora_B: torch.Tensor, **rest: Any) -> None:
        if base_layer.weight.is_meta and type(base_layer).__name__ == "Linear4bit":
            self.weight = torch.nn.Parameter(torch.empty(len(lora_B), dtype=base_layer.weight.dtype, device="meta"))
        else:
            plain(self, base_layer=base_layer, lora_B=lora_B, **rest)

    with patched("DoraLinearLayer.update_layer", update_layer):
        yield


def save_over_original_base(model: PreTrainedModel, folder: Path) -> None:
    """Rewrites the adapter in `folder` for the original base, if PiSSA or OLoRA changed the one in memory.

    They train W' + s B A, where W' = W - s B0 A0 and A0, B0 are the initial values. That equals W + s [B, -B0] [A; A0]: a
    plain LoRA of twice the rank, which loads, merges and switches like any other.
    """
    initial = getattr(model, "initial_adapter", None)
    if not isinstance(model, PeftModel) or initial is None:
        return
    initial, tensors = dict(initial), {}
    for name, tensor in get_peft_model_state_dict(model).items():
        tensor = tensor.detach().cpu()
        if ".lora_A." in name:
            tensor = torch.cat([tensor, initial[name]], dim=0)
        elif ".lora_B." in name:
            tensor = torch.cat([tensor, -initial[name]], dim=1)
        tensors[name] = tensor.contiguous()
    config = copy.deepcopy(model.peft_config["default"])
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # the same s at twice the rank
    config.r, config.init_lora_weights, config.inference_mode = 2 * config.r, True, True
    config.save_pretrained(str(folder))
    temporary = folder / ".adapter_model.safetensors"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "adapter_model.safetensors")
