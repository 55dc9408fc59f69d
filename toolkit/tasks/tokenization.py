"""Turns prompts and targets into token ids and labels, for T5-like and GPT-like models, and counts truncated tokens.

Of a prompt only the text is truncated; the instruction around it is always kept whole.
"""

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from toolkit.errors import UserError
from toolkit.models.losses import IGNORE_INDEX


@dataclass
class Truncation:
    """How much of a split was truncated."""

    rows: int = 0
    text_tokens: int = 0
    target_tokens: int = 0
    masked_turns: int = 0  # the assistant's turns in a chat that the template writes differently from answers
    unwritten_turns: int = 0  # other turns in a chat, or tools, that the template leaves out
    unusual_roles: Counter[str] = field(default_factory=Counter)  # turns of a chat by role, where it may be a mistake


@dataclass(frozen=True)
class PromptTokenizer:
    """Encodes rows for one tokenizer and one kind of model. Tasks with other rows derive from it.

    `max_length` is in tokens: of the encoder's input (T5-like), or of prompt and target together (GPT-like).
    `max_target_length` is that of the target with its end-of-text token, or 0 if the task generates nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    is_encoder_decoder: bool
    max_length: int
    max_target_length: int
    label_names: tuple[str, ...] = ()  # the classes, if the task has any
    goes_on: ClassVar[bool] = True  # whether a target follows the prompt

    def prompt(self, text: Any, room: int | None = None) -> tuple[list[int], int]:
        """The ids of the prompt with `text`, at most `room` of them, and how many tokens of the text were cut off.

        `room` defaults to `max_length` (T5-like), or `max_length` less `max_target_length` (GPT-like).

        Raises: UserError if not even an empty text fits.
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
        """One training row: `input_ids`, `attention_mask` and `labels`; adds the truncated tokens to `lost`.

        T5-like: labels (target,) are the target's ids. GPT-like: ids are the prompt followed by the target, and labels
        (prompt + target,) are masked over the prompt, so that only the target counts in the loss. The prompt is truncated
        to the same length as for generation, however long the target is.
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
        """Like `prompt`, for a tokenizer without a fast form (ByT5's), which does not give its tokens' positions in the text."""
        self._empty(room)
        keep = bisect_right(range(1, len(text) + 1), room, key=lambda end: len(self._prompt_ids(text[:end])))
        ids = self._prompt_ids(text[:keep])
        return ids, whole - len(ids)

    def _empty(self, room: int) -> list[int]:
        """The ids of the prompt without a text; raises UserError if they are more than `room`."""
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
        # A target follows the prompt's last word, so it starts with a space; SentencePiece adds one by itself.
        first = (self.tokenizer.tokenize("a") or [""])[0]
        text = target if first.startswith("\u2581") else f" {target}"
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return [*ids, self.tokenizer.eos_token_id]

    def end_tokens(self) -> list[int]:
        """The ids that end an answer, in addition to the end-of-text tokens of tokenizer and model."""
        return []

    def remarks(self) -> list[str]:
        """Remarks for the user on how rows are made."""
        return []

    def _prompt_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(self.template.replace("{text}", text), verbose=False).input_ids
        if self.goes_on and not self.is_encoder_decoder and ids[-1:] == [self.tokenizer.eos_token_id]:
            ids = ids[:-1]  # some tokenizers end each text with this token, but the target still follows the prompt
        return ids
