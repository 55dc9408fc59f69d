"""Bottleneck adapters: a small network after each sublayer. PEFT does not have this method, so it is registered here.

`PeftModel.save_pretrained` saves such an adapter. `PeftModel.from_pretrained` loads it after `import toolkit.methods.adapter`.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.methods.base import (
    EMBEDDED,
    FEED_FORWARD_OUTPUTS,
    PeftBased,
    check_least,
    check_names,
    left_out,
    linear_names,
    linear_paths,
    say_in_run,
    task_type,
)
from toolkit.models.quantization import stacked_experts

# Names that architectures give to the last linear layer of attention
ATTENTION_OUTPUTS: tuple[str, ...] = (
    "o",
    "o_proj",
    "out_proj",
    "attn.c_proj",
    "self_attn.dense",
    "attention.dense",
    "self_attention.dense",
)
ATTENTION_OUTPUTS += ("attention.output.dense", "self_attn.output")


class AdapterType(StrEnum):
    """The name of this method in PEFT's tables, which accept any name; PEFT's own enum `PeftType` cannot be extended."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """Adapters with inner width `bottleneck_size` on the outputs of `target_modules`."""

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bottleneck_size: int = 64
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = AdapterType.BOTTLENECK
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """y + up(relu(down(y))), where y (..., out) is the wrapped layer's output. `up` starts at zero, so y is unchanged at first."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Adds an adapter named `adapter_name`."""
        _, width = _get_in_out_features(self.get_base_layer())
        self.bottleneck_down[adapter_name] = nn.Linear(width, config.bottleneck_size)
        self.bottleneck_up[adapter_name] = nn.Linear(config.bottleneck_size, width)
        nn.init.zeros_(self.bottleneck_up[adapter_name].weight)
        nn.init.zeros_(self.bottleneck_up[adapter_name].bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                y = y + up(torch.relu(down(self._cast_input_dtype(y, down.weight.dtype)))).to(y.dtype)
        return y


class BottleneckModel(BaseTuner):
    """Wraps each target in a `BottleneckLayer`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, current_key: str
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError("a bottleneck adapter is not linear, so it cannot be merged into a weight")


PEFT_TYPE_TO_CONFIG_MAPPING[AdapterType.BOTTLENECK] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[AdapterType.BOTTLENECK] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[AdapterType.BOTTLENECK] = BottleneckModel.prefix


@dataclass
class Adapter(PeftBased):
    """Bottleneck adapters after attention and feed-forward (Houlsby et al. 2019, arXiv:1902.00751), or only after the
    feed-forward (Pfeiffer et al. 2020, arXiv:2005.00247).

    Each has 2 x width x size parameters. They cannot be merged into the weights, so generation is a little slower.
    """

    _argument_group_name: ClassVar[str] = "bottleneck adapters"
    name: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "arXiv:1902.00751"
    needs_import: ClassVar[str] = "toolkit.methods.adapter"
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 5e-4}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {"learning_rate": 5e-3}

    adapter_style: Literal["houlsby", "pfeiffer"] = field(
        default="houlsby",
        metadata={
            "help": "houlsby: after attention and feed-forward; pfeiffer: only after the feed-forward, at half the cost."
        },
    )
    adapter_size: int = field(default=64, metadata={"help": "Inner width: trainable parameters grow with it."})
    adapter_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the linear layers that get an adapter. Default: the last layer of each sublayer."},
    )

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for an impossible size, and for a style without effect because target modules are named."""
        super().check(given)
        check_least(self, 1, "adapter_size")
        if "adapter_style" in given and self.adapter_target_modules:
            raise UserError(
                "--adapter_style has no effect together with --adapter_target_modules; leave one of them out"
            )

    @classmethod
    def merge_refusal(cls, config: PeftConfig) -> str:
        """An adapter has a nonlinearity between its two matrices."""
        return "a bottleneck adapter is not linear, so no weight can stand for it"

    def configure(self, model: PreTrainedModel) -> BottleneckConfig:
        """The configuration for PEFT.

        Raises: UserError if the names of the last layers of the model's sublayers are not known.
        """
        targets = self.adapter_target_modules
        if targets:
            check_names(model, "adapter_target_modules", targets, linear_names(model))
        else:
            paths = linear_paths(model)
            both = (FEED_FORWARD_OUTPUTS, *([ATTENTION_OUTPUTS] if self.adapter_style == "houlsby" else []))
            found = [[n for n in group if any(path.endswith(f".{n}") for path in paths)] for group in both]
            if stacked_experts(model) and any(found):
                say_in_run(model, "targets", "no adapter follows the experts, because they are stacked tensors")
            elif not all(found):
                raise UserError(
                    f"the last layers of the sublayers of {model.config.model_type!r} are not known; "
                    f"name them with --adapter_target_modules, from: {', '.join(linear_names(model))}"
                )
            targets = [name for group in found for name in group]
        return BottleneckConfig(
            target_modules=targets,
            exclude_modules=left_out(model),
            bottleneck_size=self.adapter_size,
            task_type=task_type(model),
        )
