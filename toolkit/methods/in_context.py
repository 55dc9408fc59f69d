"""In-context learning: nothing is trained; the prompt contains examples."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import PreTrainedModel, TrainingArguments

from toolkit.errors import UserError
from toolkit.methods.base import EMBEDDED, Method


@dataclass
class InContext(Method):
    """The base model with examples in its prompt (Brown et al. 2020, arXiv:2005.14165): the baseline for every method."""

    _argument_group_name: ClassVar[str] = "in-context learning"
    name: ClassVar[str] = "in_context"
    paper: ClassVar[str] = "arXiv:2005.14165"
    freezes_base: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    used_training_flags: ClassVar[frozenset[str]] = frozenset(
        {"bf16", "fp16", "output_dir", "per_device_eval_batch_size", "seed", "tf32", "use_cpu"}
    )
    training_defaults: ClassVar[dict[str, Any]] = {}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED

    num_shots: list[int] = field(
        default_factory=lambda: [0, 1, 4],
        metadata={
            "help": "How many rows of the train split precede the question as examples; each number is tried separately."
        },
    )

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for impossible numbers, and for flags that only training uses."""
        if any(shots < 0 for shots in self.num_shots) or len(set(self.num_shots)) < len(self.num_shots):
            got = " ".join(map(str, self.num_shots))
            raise UserError(f"--num_shots {got} is not possible; give different whole numbers, such as 0 1 4")
        for name in sorted({f.name for f in fields(TrainingArguments)} & set(given) - self.used_training_flags):
            raise UserError(f"--{name} has no effect here, because nothing is trained; leave it out")

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model`, frozen."""
        model.requires_grad_(False)
        return model
