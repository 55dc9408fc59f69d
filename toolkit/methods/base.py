"""What every method offers to the recipes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel


@dataclass
class Method(ABC):
    """A way to fine-tune: its fields are its flags, its class says what it is and what suits it."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""  # arXiv id
    freezes_base: ClassVar[bool]
    training_defaults: ClassVar[dict[str, Any]]  # by flag name, for real models
    embedded_defaults: ClassVar[dict[str, Any]]  # on top of them, for the tiny embedded one

    def check(self, given: dict[str, Any]) -> None:  # noqa: B027 - most methods have something to check, not all
        """Raises UserError for flags (`given`: those that the user named) that cannot be right together."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` with this method in place and `requires_grad` set; works on the meta device too.

        Raises: UserError where the method does not fit the model.
        """
