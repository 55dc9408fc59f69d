"""What every task offers: to the data, how its rows become token ids; to the evaluation, how answers come and are scored."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.models.generation import generate
from toolkit.models.heads import ModelKind
from toolkit.tasks.tokenization import PromptTokenizer


def text_in(row: dict[str, Any], flag: str) -> str:
    """The text that the column of `flag` has in `row`; raises UserError for a list or an object."""
    if not isinstance(row[flag], str):
        raise UserError(f"its {flag} has {str(row[flag])[:80]!r}, which is no text; name another with --{flag}")
    return row[flag]


class Task(ABC):
    """A task, without state: what a run knows of its data is in its `PromptTokenizer` and in `toolkit.data.loading.TaskData`."""

    name: ClassVar[str]
    model_kind: ClassVar[ModelKind] = "generating"
    flags: ClassVar[dict[str, Any]]  # the data flags that have an effect here and not in every task, and their defaults
    prompt_tokenizer: ClassVar[type[PromptTokenizer]] = PromptTokenizer
    metric: ClassVar[str]  # the score that stands for the others, which `row_scores` gives row by row
    higher_is_better: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ()  # the flags whose columns need not be there
    scoring: ClassVar[str]  # one sentence on what the scores are

    def column_flags(self, given: dict[str, Any]) -> list[str]:
        """The flags that name the columns to read; `given` has the data flags that are set."""
        return [flag for flag in self.flags if flag.endswith("_column")]

    def check(self, given: dict[str, Any]) -> None:  # noqa: B027 - most tasks have nothing to check
        """Raises UserError for flags (`given`: those that the user named) that cannot be right together."""

    @abstractmethod
    def pair(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """The text and the target of a row, whose values go by the flags that name their columns.

        Raises: UserError for values that are none.
        """

    def shown(self, text: Any) -> str:
        """The text of a pair as `completions.csv` shows it."""
        return str(text)

    def reference(self, prompt_tokenizer: PromptTokenizer, text: Any, target: Any, prompt: Sequence[int]) -> str:
        """What an answer to `text`, whose `prompt` has these token ids, is scored against."""
        return str(target)

    def answers(
        self,
        model: PreTrainedModel,
        prompt_tokenizer: PromptTokenizer,
        prompts: Sequence[Sequence[int]],
        batch_size: int,
        num_beams: int = 1,
        title: str = "",
    ) -> list[str]:
        """What the model answers to each of `prompts` (token ids), in their order, on every rank."""
        ends, empty = (
            prompt_tokenizer.end_tokens(),
            prompt_tokenizer.target_ids("") if prompt_tokenizer.is_encoder_decoder else (),
        )
        return generate(
            model,
            prompt_tokenizer.tokenizer,
            prompts,
            batch_size,
            prompt_tokenizer.max_target_length,
            num_beams,
            title,
            ends,
            empty,
        )

    def continuations(
        self,
        model: PreTrainedModel,
        prompt_tokenizer: PromptTokenizer,
        prompts: Sequence[Sequence[int]],
        batch_size: int,
        num_beams: int = 1,
    ) -> list[str]:
        """What a finished run shows for a text of the user: the answer, unless the task scores something else."""
        return self.answers(model, prompt_tokenizer, prompts, batch_size, num_beams)

    @abstractmethod
    def score(
        self, predictions: Sequence[str], references: Sequence[str], label_names: Sequence[str]
    ) -> dict[str, float]:
        """The scores of all answers together; `label_names` has the classes, where the task has any."""

    @abstractmethod
    def row_scores(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """One score a row, for comparing two models row by row."""
