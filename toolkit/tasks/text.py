"""Plain text: every token of a row is learned, and rows are scored by perplexity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from toolkit.models.generation import generate, losses
from toolkit.models.heads import ModelKind
from toolkit.models.loading import longest_input
from toolkit.tasks.base import Task, text_in
from toolkit.tasks.tokenization import PromptTokenizer, Truncation

CONTINUATION = 128  # tokens that `footprint generate` adds to a text


@dataclass(frozen=True)
class TextPromptTokenizer(PromptTokenizer):
    """Rows in which every token is a label."""

    def row(self, text: Any, target: str, lost: Truncation) -> dict[str, Any]:
        """The ids of the text, plus the end-of-text token if it fits into `max_length`; the labels are the ids."""
        ids, cut = self.prompt(text)
        if not cut and len(ids) < self.max_length:
            ids = [*ids, self.tokenizer.eos_token_id]
        lost.rows += cut > 0
        lost.text_tokens += cut
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}


class Text(Task):
    """Language modelling on a column of plain text; each row is one text."""

    name: ClassVar[str] = "text"
    one_target: ClassVar[bool] = False
    model_kind: ClassVar[ModelKind] = "decoder"
    flags: ClassVar[dict[str, Any]] = {"text_column": "text"}
    prompt_tokenizer: ClassVar[type[PromptTokenizer]] = TextPromptTokenizer
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    scoring: ClassVar[str] = (
        "The loss is the mean over all tokens in nats, its exponential the perplexity; "
        "in completions.csv the reference is a text's number of scored tokens, and base and tuned are its losses"
    )

    def pair(self, row: dict[str, Any]) -> tuple[str, str]:
        """The text, and an empty target."""
        return text_in(row, "text_column"), ""

    def reference(self, prompt_tokenizer: PromptTokenizer, text: str, target: str, prompt: Sequence[int]) -> str:
        """The number of predicted tokens: all but the first."""
        return str(len(prompt) - 1)

    def answers(
        self,
        model: PreTrainedModel,
        prompt_tokenizer: PromptTokenizer,
        prompts: Sequence[Sequence[int]],
        batch_size: int,
        num_beams: int = 1,
        title: str = "",
    ) -> list[str]:
        """The mean loss over the tokens of each text, in nats."""
        return [repr(loss) for loss in losses(model, prompt_tokenizer.tokenizer, prompts, batch_size, title)]

    def continuations(
        self,
        model: PreTrainedModel,
        prompt_tokenizer: PromptTokenizer,
        prompts: Sequence[Sequence[int]],
        batch_size: int,
        num_beams: int = 1,
    ) -> list[str]:
        """The model's continuation of each of `prompts`: at most `CONTINUATION` tokens, within the model's positions."""
        longest = max(map(len, prompts), default=0)
        room = max(1, (longest_input(model.config) or longest + CONTINUATION) - longest)
        return generate(model, prompt_tokenizer.tokenizer, prompts, batch_size, min(CONTINUATION, room), num_beams)

    def score(
        self, predictions: Sequence[str], references: Sequence[str], label_names: Sequence[str]
    ) -> dict[str, float]:
        """The mean loss over all tokens of all texts, and its exponential."""
        tokens = [int(number) for number in references]
        total = math.fsum(float(loss) * number for loss, number in zip(predictions, tokens, strict=True))
        loss = total / max(1, sum(tokens))
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}

    def row_scores(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """The loss of each text; lower is better."""
        return [float(loss) for loss in predictions]
