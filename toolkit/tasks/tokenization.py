"""Prompt and target become token ids and labels, for T5-like and GPT-like models; what is cut off is counted.

Only the text inside the prompt is ever shortened: the instruction around it always reaches the model whole.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from toolkit.errors import UserError
from toolkit.models.losses import IGNORE_INDEX


@dataclass
class Truncation:
    """How much of a split did not fit."""

    rows: int = 0
    text_tokens: int = 0
    target_tokens: int = 0
    masked_turns: int = 0  # of the assistant in a chat, which the template does not write as it would answers
    unwritten_turns: int = 0  # of others in a chat, or tools, which the template leaves out


@dataclass(frozen=True)
class PromptTokenizer:
    """Encodes rows for one tokenizer and kind of model.

    `max_length` is the length in tokens of the encoder's input (T5-like) or of prompt and target together (GPT-like);
    `max_target_length` that of the target with its end-of-text token, 0 where nothing is written. Tasks whose rows are
    made otherwise derive from it.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    is_encoder_decoder: bool
    max_length: int
    max_target_length: int
    label_names: tuple[str, ...] = ()  # the classes, where the task has any
    goes_on: ClassVar[bool] = True  # whether something is written after the prompt

    def prompt(self, text: Any, room: int | None = None) -> tuple[list[int], int]:
        """The ids of the prompt around `text`, at most `room` of them, and how many tokens of the text were cut off.

        `room` defaults to what generation leaves: all of `max_length` (T5-like), or that less the target's (GPT-like).

        Raises: UserError where not even an empty text fits.
        """
        if room is None:
            room = self.max_length if self.is_encoder_decoder else self.max_length - self.max_target_length
        ids = self._prompt_ids(text)
        whole = len(ids)
        if whole <= room:
            return ids, 0
        if not self.tokenizer.is_fast:
            return self._cut_by_characters(text, room, whole)
        inside = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in inside["offset_mapping"]]
        keep = len(ends) - (whole - room)
        while keep > 0:
            ids = self._prompt_ids(text[: ends[keep - 1]])
            if len(ids) <= room:
                return ids, whole - len(ids)
            keep -= len(ids) - room
        ids = self._empty(room)
        return ids, whole - len(ids)

    def row(self, text: Any, target: str, lost: Truncation) -> dict[str, Any]:
        """One training row: `input_ids`, `attention_mask` and `labels`; adds what was cut off to `lost`.

        T5-like: labels (target,) are the target's ids. GPT-like: ids are prompt then target, and labels
        (prompt + target,) are masked over the prompt, so that the loss is on the target alone. The prompt is cut as it
        is where the model answers, whatever the target's length.
        """
        labels = self.target_ids(target)
        cut_target = max(0, len(labels) - self.max_target_length)
        if cut_target:
            labels = [*labels[: self.max_target_length - 1], labels[-1]]  # keeps the end-of-text token
        ids, cut_text = self.prompt(text)
        lost.rows += bool(cut_text or cut_target)
        lost.text_tokens += cut_text
        lost.target_tokens += cut_target
        if not self.is_encoder_decoder:
            ids, labels = ids + labels, [IGNORE_INDEX] * len(ids) + labels
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def _cut_by_characters(self, text: str, room: int, whole: int) -> tuple[list[int], int]:
        """As `prompt`, for a tokenizer without a fast form (ByT5's), which does not tell where in the text its tokens are."""
        self._empty(room)
        keep = bisect_right(range(1, len(text) + 1), room, key=lambda end: len(self._prompt_ids(text[:end])))
        ids = self._prompt_ids(text[:keep])
        return ids, whole - len(ids)

    def _empty(self, room: int) -> list[int]:
        """The ids of the prompt without a text; raises UserError where they are more than `room`."""
        ids = self._prompt_ids("")
        if len(ids) > room:
            raise UserError(
                f"--max_length {self.max_length} leaves {room} tokens for a prompt whose own words take {len(ids)}; "
                "raise it, or shorten --prompt_template or --max_target_length"
            )
        return ids

    def target_ids(self, target: str) -> list[int]:
        """The target's ids with the end-of-text token, uncut."""
        if self.is_encoder_decoder:
            return self.tokenizer(text_target=target, verbose=False).input_ids
        # A target follows the prompt's last word, so it starts with a space; SentencePiece puts one there by itself.
        first = self.tokenizer.tokenize("a")[0]
        text = target if first.startswith("\u2581") else f" {target}"
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return [*ids, self.tokenizer.eos_token_id]

    def end_tokens(self) -> list[int]:
        """The ids that end an answer beside the tokenizer's and the model's own end-of-text tokens."""
        return []

    def remarks(self) -> list[str]:
        """What the user should know of how rows are made."""
        return []

    def _prompt_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(self.template.replace("{text}", text), verbose=False).input_ids
        if self.goes_on and not self.is_encoder_decoder and ids[-1:] == [self.tokenizer.eos_token_id]:
            ids = ids[:-1]  # a tokenizer that closes each text must not close the prompt
        return ids
