"""Chat: conversations in the tokenizer's own chat template, with the loss on the assistant's tokens alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jinja2 import TemplateError

from toolkit.errors import UserError
from toolkit.models import ModelKind
from toolkit.tasks.summarization import Summarization
from toolkit.tasks.tokenization import MASKED, Encoder, Truncation

Messages = list[dict[str, str]]  # as the hub's chat data sets have them: [{"role": "user", "content": "..."}, ...]


@dataclass(frozen=True)
class ChatEncoder(Encoder):
    """Encodes conversations by the tokenizer's chat template.

    Raises: UserError where the tokenizer has none, or cannot tell where in a text its tokens are.
    """

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.tokenizer.name_or_path}: its tokenizer has no chat template, so it does not say how a conversation "
                "is written; give a chat model (or its tokenizer with --tokenizer_name), or use --task summarization"
            )

        if not self.tokenizer.is_fast:
            raise UserError(
                f"{self.tokenizer.name_or_path}: its tokenizer has no fast form, without which the assistant's tokens cannot "
                "be told; name one that has with --tokenizer_name, or use --task summarization"
            )

    def prompt(self, text: str | Messages, room: int | None = None) -> tuple[list[int], int]:
        """The ids of a conversation up to where the assistant answers, and how many were cut off at its beginning."""
        if room is None:
            room = self.max_length - self.max_target_length
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        ids = self._ids(self._written(messages, add_generation_prompt=True)).input_ids
        return ids[-room:], max(0, len(ids) - room)

    def row(self, text: Messages, target: str, lost: Truncation) -> dict[str, Any]:
        """The ids of the whole conversation, cut to `max_length`; labels are masked but for every turn of the assistant.

        A turn begins after what the template writes to make the model answer, and ends with its end-of-turn token.
        """
        messages = [*text, {"role": "assistant", "content": target}]
        whole = self._written(messages)
        encoded = self._ids(whole, return_offsets_mapping=True)
        labels = [MASKED] * len(encoded.input_ids)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                begin, end = self._span(messages, number, whole)
                for place, (first, last) in enumerate(encoded.offset_mapping):
                    if begin <= first and first < last <= end:
                        labels[place] = encoded.input_ids[place]
        cut = max(0, len(labels) - self.max_length)
        lost.rows += cut > 0
        lost.text_tokens += cut
        ids, labels = encoded.input_ids[: self.max_length], labels[: self.max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def end_tokens(self) -> list[int]:
        """The last special or added token of what the template writes after the assistant's words, where there is any.

        It is the last label of each turn, but often not the tokenizer's end-of-text token (ChatML's <|im_end|>).
        """
        answer = "Hello"
        try:
            written = self._written([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": answer}])
        except UserError:
            return []  # the template takes no conversation so plain
        _, found, after = written.rstrip().rpartition(answer)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return [token for token in self._ids(after).input_ids if found and token in special][-1:]

    def _span(self, messages: Messages, number: int, whole: str) -> tuple[int, int]:
        """Where in the conversation, written `whole`, turn `number` begins and ends, in characters."""
        upto = self._written(messages[: number + 1])
        if not whole.startswith(upto):
            raise UserError(
                "the tokenizer's chat template rewrites earlier turns (thoughts, for instance) when later ones follow, so "
                "the assistant's tokens cannot be told; give conversations with one turn of the assistant"
            )
        asked = self._written(messages[:number], add_generation_prompt=True)
        begin = len(asked)
        while not upto.startswith(asked[:begin]):  # a template may ask for the answer in more words than it keeps
            begin -= 1
        return begin, len(upto.rstrip())

    def _ids(self, written: str, **kwargs: Any) -> Any:
        return self.tokenizer(written, add_special_tokens=False, verbose=False, **kwargs)

    def _written(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:  # templates refuse what they do not know, such as a system turn
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the tokenizer's chat template refuses a conversation of {roles}: {error}") from None


class Chat(Summarization):
    """Answers in a conversation; scored on the last turn of the assistant, by ROUGE."""

    name: ClassVar[str] = "chat"
    model_kind: ClassVar[ModelKind] = "decoder"
    flags: ClassVar[dict[str, Any]] = {
        "messages_column": "messages",
        "prompt_column": None,
        "response_column": None,
        "max_target_length": 128,
        "num_beams": 1,
    }
    encoder: ClassVar[type[Encoder]] = ChatEncoder
    scoring: ClassVar[str] = "ROUGE F-measures with stemming, of the last turn of each conversation"

    def column_flags(self, given: dict[str, Any]) -> list[str]:
        """The messages, or prompt and response where those are named."""
        return ["prompt_column", "response_column"] if given.get("prompt_column") else ["messages_column"]

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError where one of --prompt_column and --response_column is missing, or messages are named too."""
        named = [flag for flag in ("prompt_column", "response_column") if given.get(flag)]
        if len(named) == 1:
            raise UserError(f"--{named[0]} is half of a pair; give both --prompt_column and --response_column")
        if named and given.get("messages_column"):
            raise UserError("--messages_column and --prompt_column exclude each other; give one form of conversation")

    def pair(self, row: dict[str, Any]) -> tuple[Messages, str]:
        """The conversation before the last turn of the assistant, and what that turn says.

        Raises: UserError for a value that is no list of messages, or has no turn of the assistant.
        """
        if "prompt_column" in row:
            return [{"role": "user", "content": str(row["prompt_column"])}], str(row["response_column"])
        messages = row["messages_column"]
        form = 'a list of {"role": ..., "content": ...}'
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and m.get("role") and isinstance(m.get("content"), str) for m in messages
        ):
            raise UserError(f"its conversation is not {form}, but {str(messages)[:80]!r}")
        messages = [{"role": m["role"], "content": m["content"]} for m in messages]
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise UserError(f"its conversation has no turn of the role assistant (it has {roles})")
        return messages[: turns[-1]], messages[turns[-1]]["content"]

    def shown(self, text: Messages) -> str:
        """A turn a line; the words alone where there is one turn, so that `footprint generate` takes them."""
        if len(text) == 1:
            return text[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in text)
