"""The interface of a task: how rows become token ids, how a model answers, and how answers are scored."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.models.generation import generate
from toolkit.models.heads import ModelKind
from toolkit.tasks.tokenization import PromptTokenizer


def text_in(row: dict[str, Any], flag: str) -> str:
    """The text of `row` in the column that `flag` names; raises UserError for a list or an object."""
    if not isinstance(row[flag], str):
        raise UserError(f"its {flag} has {str(row[flag])[:80]!r}, which is not text; name another column with --{flag}")
    return row[flag]


class NothingToLearn(UserError):
    """A row that is well formed and has no target, such as a conversation without a turn of the assistant."""


class Task(ABC):
    """A task. It has no state: a run's `PromptTokenizer` and `toolkit.data.loading.TaskData` hold that."""

    name: ClassVar[str]
    model_kind: ClassVar[ModelKind] = "generating"
    flags: ClassVar[dict[str, Any]]  # the data flags that this task uses and others do not, and their defaults
    prompt_tokenizer: ClassVar[type[PromptTokenizer]] = PromptTokenizer
    one_target: ClassVar[bool] = True  # whether only the end of a row, at most --max_target_length tokens, has labels
    metric: ClassVar[str]  # the headline score, which `row_scores` gives for each row
    higher_is_better: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ()  # flags of columns that may be missing
    scoring: ClassVar[str]  # one sentence that explains the scores

    def column_flags(self, given: dict[str, Any]) -> list[str]:
        """The flags of the columns to read; `given` holds the data flags that are set."""
        return [flag for flag in self.flags if flag.endswith("_column")]

    def check(self, given: dict[str, Any]) -> None:  # noqa: B027 - most tasks have nothing to check
        """Raises UserError if the user's flags (`given`) contradict each other."""

    @abstractmethod
    def pair(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """The text and the target of a row; the keys of `row` are the flags that name the columns.

        Raises: UserError for values that are not a text and its target.
        """

    def shown(self, text: Any) -> str:
        """The text of a pair, as `completions.csv` shows it."""
        return str(text)

    def reference(self, prompt_tokenizer: PromptTokenizer, text: Any, target: Any, prompt: Sequence[int]) -> str:
        """The reference for scoring an answer to `text`; `prompt` holds the prompt's token ids."""
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
        """The model's answers to `prompts` (token ids), in their order, on every rank."""
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
        """The text that `footprint generate` shows for each prompt: the answer, unless the task scores something else."""
        return self.answers(model, prompt_tokenizer, prompts, batch_size, num_beams)

    @abstractmethod
    def score(
        self, predictions: Sequence[str], references: Sequence[str], label_names: Sequence[str]
    ) -> dict[str, float]:
        """The scores over all answers; `label_names` holds the classes, if the task has any."""

    @abstractmethod
    def row_scores(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """One score for each row, to compare two models row by row."""
