"""Classification by a head: a linear layer over the text's last hidden state, in place of the language model's head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from toolkit.models.generation import classify
from toolkit.models.heads import ModelKind
from toolkit.tasks.classification import Classification
from toolkit.tasks.tokenization import PromptTokenizer, Truncation


@dataclass(frozen=True)
class HeadPromptTokenizer(PromptTokenizer):
    """Rows whose label is a class index. If the tokenizer ends each text with a special token (RoBERTa's), it is kept."""

    goes_on: ClassVar[bool] = False

    def row(self, text: Any, target: str, lost: Truncation) -> dict[str, Any]:
        """`input_ids` and `attention_mask` of the text, cut to `max_length`, and `labels`, the index of its class."""
        ids, cut = self.prompt(text)
        lost.rows += cut > 0
        lost.text_tokens += cut
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": self.label_names.index(target)}

    def _prompt_ids(self, text: str) -> list[int]:
        """The ids of a text. Those for an encoder-decoder have one end-of-text token: its head reads there, and takes no other number."""
        ids, end = super()._prompt_ids(text), self.tokenizer.eos_token_id
        if not self.is_encoder_decoder or end is None:
            return ids
        last = len(ids) - 1 - ids[::-1].index(end) if end in ids else None
        kept = [token for place, token in enumerate(ids) if token != end or place == last]
        return kept if last is not None else [*kept, end]


class SequenceClassification(Classification):
    """Chooses the class with `AutoModelForSequenceClassification`. Architectures whose head reads padding are refused."""

    name: ClassVar[str] = "sequence_classification"
    model_kind: ClassVar[ModelKind] = "head"
    flags: ClassVar[dict[str, Any]] = {"text_column": "sentence", "label_column": "label"}
    prompt_tokenizer: ClassVar[type[PromptTokenizer]] = HeadPromptTokenizer
    scoring: ClassVar[str] = "The majority class is the accuracy of always answering the most frequent label"

    def answers(
        self,
        model: PreTrainedModel,
        prompt_tokenizer: PromptTokenizer,
        prompts: Sequence[Sequence[int]],
        batch_size: int,
        num_beams: int = 1,
        title: str = "",
    ) -> list[str]:
        """The name of the class with the largest logit for each of `prompts`."""
        classes = classify(model, prompt_tokenizer.tokenizer, prompts, batch_size, title)
        return [prompt_tokenizer.label_names[number] for number in classes]

    def score(
        self, predictions: Sequence[str], references: Sequence[str], label_names: Sequence[str]
    ) -> dict[str, float]:
        """Accuracy, macro-F1 and the share of the most frequent label. A head's answer is never unknown."""
        scores = super().score(predictions, references, label_names)
        return {name: score for name, score in scores.items() if name != "unknown"}
