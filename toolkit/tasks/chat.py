"""Chat: conversations in the tokenizer's own chat template, with the loss on the assistant's tokens alone."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from jinja2 import TemplateError

from toolkit.errors import UserError
from toolkit.models.heads import ModelKind
from toolkit.models.losses import IGNORE_INDEX
from toolkit.tasks.base import text_in
from toolkit.tasks.summarization import Summarization
from toolkit.tasks.tokenization import PromptTokenizer, Truncation

Message = dict[str, Any]  # {"role": "user", "content": "..."}, and what else a template may know: tool_calls, name ...
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of thoughts; transformers passes on each as the others
FORM = 'a list of {"role": ..., "content": ...}'
REFUSALS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)  # what a template may raise
PROBE: Message = {"role": "assistant", "content": "\u00a7"}  # shows what the template writes before an answer


REWRITTEN = (
    "the tokenizer's chat template rewrites earlier turns (thoughts, for instance) when later ones follow, or writes this answer "
    "otherwise than it asks for one, so the assistant's tokens cannot be told; give conversations with one turn of the assistant, "
    "take thoughts out of them, or give another chat_template (in the folder of the tokenizer)"
)


class Conversation(NamedTuple):
    """What was said, and the JSON schemas of the tools that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def upto(self, number: int) -> "Conversation":
        """Its first `number` messages."""
        return Conversation(self.messages[:number], self.tools)

    def then(self, *messages: Message) -> "Conversation":
        """It and what was said after it."""
        return Conversation([*self.messages, *messages], self.tools)


@dataclass
class _Turn:
    """A turn of the assistant in a conversation as the template writes it."""

    message: Message
    begin: int | None = None  # in characters; None where the turn is not written as it would be as an answer
    end: int = 0  # its last token begins before this
    same: int = 0  # and ends no later than this: there the conversation goes on otherwise than it would close
    missing: str | None = None  # a part of it that is not there

    @property
    def is_learned(self) -> bool:
        return self.begin is not None and self.missing is None and _is_told(self.message)


@dataclass(frozen=True)
class ChatPromptTokenizer(PromptTokenizer):
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

    def prompt(self, text: str | list[Message] | Conversation, room: int | None = None) -> tuple[list[int], int]:
        """The ids of a conversation up to where the assistant answers, and how many were cut off at its beginning.

        Uncut they are the ids that stand before the answer in a training row of the conversation.
        """
        if room is None:
            room = self.max_length - self.max_target_length
        asked = _conversation(text)
        written = self._asked(asked)
        ids, _, _ = self._ids(written, _begins(self._turns(asked, written)))
        return ids[-room:], max(0, len(ids) - room)

    def row(self, text: list[Message] | Conversation, target: str | Message, lost: Truncation) -> dict[str, Any]:
        """The ids of the whole conversation, cut to `max_length`; labels are masked but for every turn of the assistant.

        A turn begins after what the template writes to make the model answer, and ends with its end-of-turn token. An
        earlier turn that the template writes otherwise once others follow stays masked, for no answer looks like that.

        Raises: UserError where the template leaves out a part of the last turn.
        """
        whole = _conversation(text).then(_answer(target))
        written = self._written(whole)
        turns = self._turns(whole, written)
        ids, labels = self._labelled(written, turns, [turn for turn in turns if turn.is_learned])
        lost.masked_turns += sum(_is_told(turn.message) and not turn.is_learned for turn in turns)
        there = _squeezed(written)
        others = [str(message.get("content", "")) for message in whole.messages if message["role"] != "assistant"]
        names = [str(tool.get("function", tool).get("name", "")) for tool in whole.tools or []]
        lost.unwritten_turns += sum(not _is_in(said, there) for said in others + names)
        cut_labels = sum(label != IGNORE_INDEX for label in labels[self.max_length :])
        cut = max(0, len(ids) - self.max_length)
        lost.rows += cut > 0
        lost.text_tokens += cut - cut_labels
        lost.target_tokens += cut_labels
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def reference(self, text: list[Message] | Conversation, target: str | Message) -> str:
        """What the assistant says, or all that the template makes of it (thoughts, calls of tools), without special tokens."""
        whole = _conversation(text).then(_answer(target))
        written = self._written(whole)
        turns = self._turns(whole, written)
        _, labels = self._labelled(written, turns, turns[-1:])
        learned = self.tokenizer.decode([label for label in labels if label != IGNORE_INDEX], skip_special_tokens=True)
        said = whole.messages[-1].get("content", "")
        return said if _squeezed(learned) == _squeezed(said) else learned.strip()

    def target_ids(self, target: str | Message) -> list[int]:
        """The ids of what the assistant says, without what the template adds."""
        return self.tokenizer(_answer(target)["content"], add_special_tokens=False, verbose=False).input_ids

    def end_tokens(self) -> list[int]:
        """The last special or added token of what the template writes after the assistant's words, where there is any.

        It is the last label of each turn, but often not the tokenizer's end-of-text token (ChatML's <|im_end|>).
        """
        try:
            written = self._written(Conversation([{"role": "user", "content": "Hi."}, PROBE]))
        except UserError:
            return []  # the template takes no conversation so plain
        _, found, after = written.rstrip().rpartition(PROBE["content"])
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        ids = self.tokenizer(after, add_special_tokens=False).input_ids
        return [token for token in ids if found and token in special][-1:]

    def remarks(self) -> list[str]:
        """What of the template makes answers other than they would be elsewhere."""
        plain = Conversation([{"role": "user", "content": "Hi."}])
        try:
            dropped = self._written(plain, add_generation_prompt=True)[len(self._asked(plain)) :]
        except UserError:
            return []
        remarks = []
        if dropped.strip():
            remarks.append(
                f"the chat template asks for an answer with {dropped!r}, which it leaves out once the answer is there; so prompts "
                "here are without it"
            )
        if not self.end_tokens():
            remarks.append(
                "the chat template ends a turn with no special token, so answers may go on up to --max_target_length"
            )
        return remarks

    def _labelled(self, written: str, turns: list[_Turn], learned: list[_Turn]) -> tuple[list[int], list[int]]:
        """The ids of a whole conversation, and labels that are masked outside of the turns of `learned`.

        Raises: UserError where the last turn cannot be learned.
        """
        last = turns[-1]
        if last.begin is None:
            raise UserError(REWRITTEN)
        if last.missing is not None:
            raise UserError(
                "the tokenizer's chat template leaves out a part of what the assistant says last "
                f"({' '.join(last.missing.split())[:60]!r}), which could then not be learned; take it out of the data, or give a "
                "chat_template that writes it (in the folder of the tokenizer)"
            )
        ids, spans, starts = self._ids(written, _begins(turns))
        labels = [IGNORE_INDEX] * len(ids)
        for turn, start in zip([turn for turn in turns if turn.begin is not None], starts, strict=True):
            if turn in learned:
                for place in range(start, len(ids)):
                    if spans[place][0] < turn.end and spans[place][1] <= turn.same:
                        labels[place] = ids[place]
        return ids, labels

    def _turns(self, conversation: Conversation, written: str) -> list[_Turn]:
        """The turns of the assistant in a conversation that the template writes as `written`, all or the beginning of it."""
        turns = []
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            turns.append(turn := _Turn(message))
            if number == 0:
                continue  # nothing asks for it
            upto = self._written(conversation.upto(number + 1))
            asked = self._asked(conversation.upto(number))
            same = _common(upto, written)
            there = _squeezed(upto[len(asked) :])
            turn.missing = next((part for part in _parts(message) if not _is_in(part, there)), None)
            stays = same == len(upto) or all(
                _is_in(part, _squeezed(upto[len(asked) : same])) for part in _parts(message)
            )
            if stays and upto.startswith(asked):
                turn.begin, turn.end = len(asked), len(upto.rstrip())
                turn.same = len(written) if same == len(upto) else same
        return turns

    def _asked(self, conversation: Conversation) -> str:
        """A conversation and what the template writes to make the model answer, as far as it stays once the answer is there."""
        asked = self._written(conversation, add_generation_prompt=True)
        kept = _common(asked, self._written(conversation.then(PROBE)))
        if kept < _common(asked, self._written(conversation)):
            raise UserError(REWRITTEN)
        return asked[:kept]

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes content that is a list of parts alone, as those of models that see images do."""

        def is_written(content: Any) -> bool:
            messages = [{"role": "user", "content": content}]
            try:
                return PROBE["content"] in self.tokenizer.apply_chat_template(messages, tokenize=False)
            except REFUSALS:
                return False

        return not is_written(PROBE["content"]) and is_written(_in_parts(PROBE["content"]))

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer begins a text with a space that is not there, as SentencePiece does."""
        return self.tokenizer.tokenize("a")[0].startswith("\u2581")

    def _ids(self, written: str, begins: Sequence[int]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """The ids of `written`, the characters of each, and how many ids come before each of `begins`.

        These are then the ids of the text before it alone. Where the tokenizer would join the end of a prompt with the
        first word of the answer (a space, most often), the answer is tokenized by itself, as the model has to write it.
        """
        done: tuple[list[int], list[tuple[int, int]]] = ([], [])
        starts, at = [], 0
        ids, spans = self._tokens(written, at)
        for begin in begins:
            before = self._tokens(written[:begin], at)
            if ids[: len(before[0])] != before[0]:
                done = (done[0] + before[0], done[1] + before[1])
                at = begin
                ids, spans = self._tokens(written, at)
                starts.append(len(done[0]))
            else:
                starts.append(len(done[0]) + len(before[0]))
        return done[0] + ids, done[1] + spans, starts

    def _tokens(self, written: str, at: int) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `written` from character `at` on, and the characters at which each begins and ends."""
        text, lead = written[at:], 0
        if at and self._adds_space:
            text, lead = (
                f"\n{text}",
                len(self.tokenizer("\n", add_special_tokens=False).input_ids),
            )  # else it adds a space
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        shift = at - (lead > 0)
        return encoded.input_ids[lead:], [
            (first + shift, last + shift) for first, last in encoded.offset_mapping[lead:]
        ]

    def _written(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        messages = conversation.messages
        try:
            return self._apply(messages, conversation.tools, add_generation_prompt)
        except REFUSALS as error:  # templates refuse what they do not know, such as a system turn
            reason = " ".join(str(error).split())[:200]
        if any(message.get("tool_calls") for message in messages):
            with suppress(*REFUSALS):  # some templates take the arguments of a call as text
                as_text = [_with_arguments(message, json.dumps) for message in messages]
                return self._apply(as_text, conversation.tools, add_generation_prompt)
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the tokenizer's chat template refuses a conversation of {roles}: {reason}")

    def _apply(self, messages: list[Message], tools: list[dict[str, Any]] | None, ask: bool) -> str:
        if self._takes_parts:
            messages = [message | {"content": _in_parts(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)


class Chat(Summarization):
    """Answers in a conversation; scored on the last turn of the assistant, by ROUGE."""

    name: ClassVar[str] = "chat"
    model_kind: ClassVar[ModelKind] = "decoder"
    flags: ClassVar[dict[str, Any]] = {
        "messages_column": "messages",
        "tools_column": "tools",
        "prompt_column": None,
        "response_column": None,
        "max_target_length": 128,
        "num_beams": 1,
    }
    optional: ClassVar[tuple[str, ...]] = ("tools_column",)
    prompt_tokenizer: ClassVar[type[PromptTokenizer]] = ChatPromptTokenizer
    scoring: ClassVar[str] = "ROUGE F-measures with stemming, of the last turn of each conversation"

    def column_flags(self, given: dict[str, Any]) -> list[str]:
        """The messages and, where there are any, the tools; or prompt and response where those are named."""
        return (
            ["prompt_column", "response_column"] if given.get("prompt_column") else ["tools_column", "messages_column"]
        )

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError where one of --prompt_column and --response_column is missing, or messages are named too."""
        named = [flag for flag in ("prompt_column", "response_column") if given.get(flag)]
        if len(named) == 1:
            raise UserError(f"--{named[0]} is half of a pair; give both --prompt_column and --response_column")
        for flag in ("messages_column", "tools_column"):
            if named and given.get(flag):
                raise UserError(f"--{flag} and --prompt_column exclude each other; give one form of conversation")

    def pair(self, row: dict[str, Any]) -> tuple[Conversation, Message]:
        """The conversation before the last turn in which the assistant says something, and that turn.

        Raises: UserError for a value that is no list of messages, or has no such turn.
        """
        if "prompt_column" in row:
            return _conversation(text_in(row, "prompt_column")), _answer(text_in(row, "response_column"))
        messages = _listed(row["messages_column"])
        if messages is None or not all(isinstance(m.get("role"), str) and m["role"] for m in messages):
            raise UserError(f"its conversation is not {FORM}, but {str(row['messages_column'])[:80]!r}")
        messages = [_message(message) for message in messages]
        tools = None
        if row.get("tools_column"):
            tools = _listed(row["tools_column"])
            if tools is None:
                raise UserError(
                    f"its tools are not a list of JSON schemas, but {str(row['tools_column'])[:80]!r}; name another --tools_column"
                )
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant" and _is_told(message)]
        if not turns:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise UserError(f"its conversation has no turn of the role assistant (it has {roles}) that says something")
        if turns[-1] == 0:
            raise UserError("its conversation begins with the only turn of the role assistant, so nothing asks for it")
        return Conversation(messages[: turns[-1]], tools or None), messages[turns[-1]]

    def shown(self, text: Conversation) -> str:
        """A turn a line; the words alone where there is one turn, so that `footprint generate` takes them."""
        if len(text.messages) == 1:
            return str(text.messages[0]["content"])
        return "\n".join(
            f"{message['role']}: {message['content'] or json.dumps(message.get('tool_calls', ''))}"
            for message in text.messages
        )

    def reference(
        self, prompt_tokenizer: PromptTokenizer, text: Conversation, target: Message, prompt: Sequence[int]
    ) -> str:
        """What the assistant says last, as a model that learned it would write it."""
        assert isinstance(prompt_tokenizer, ChatPromptTokenizer)
        return prompt_tokenizer.reference(text, target)


def _conversation(text: str | list[Message] | Conversation) -> Conversation:
    if isinstance(text, str):
        return Conversation([{"role": "user", "content": text}])
    return text if isinstance(text, Conversation) else Conversation(text)


def _in_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _answer(target: str | Message) -> Message:
    return {"role": "assistant", "content": target} if isinstance(target, str) else target


def _begins(turns: list[_Turn]) -> list[int]:
    return [turn.begin for turn in turns if turn.begin is not None]


def _listed(value: Any) -> list[dict[str, Any]] | None:
    """The objects of a list, which may be written as JSON; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else None


def _message(message: Message) -> Message:
    """A message as templates expect it: words as text, the arguments of calls as objects, nothing that is not there.

    Raises: UserError for content that is no text.
    """
    message = {name: value for name, value in message.items() if value is not None}
    content = message.get("content", "" if message["role"] not in ("system", "user") else None)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if other := next((part for part in content if not isinstance(part.get("text"), str)), None):
            raise UserError(
                f"its conversation has a part of the type {other.get('type')!r}, and only text can be learned"
            )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"its conversation is not {FORM}, but has a message {str(message)[:80]!r}")
    return _with_arguments(message | {"content": content}, _parsed)


def _with_arguments(message: Message, change: Any) -> Message:
    """`message` with the arguments of each call of a tool changed."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict):
            raise UserError(f"its conversation has a call of a tool that is no object: {str(call)[:80]!r}")
        inner = inner | {"arguments": change(inner["arguments"])} if "arguments" in inner else inner
        calls.append(call | {"function": inner} if "function" in call else inner)
    return message | {"tool_calls": calls}


def _parsed(arguments: Any) -> Any:
    """The arguments of a call as an object, where they are one that is written as text, as OpenAI's format has them."""
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    return arguments


def _is_told(message: Message) -> bool:
    """Whether a turn says something, and is to be learned (OpenAI's format has the weight 0 for those that are not)."""
    return message.get("weight") != 0 and any(part.strip() for part in _parts(message))


def _parts(message: Message) -> Iterator[str]:
    """All that a turn of the assistant says: its words, its thoughts, and the names and arguments of its calls."""
    yield message.get("content", "")
    for name in REASONING:
        if isinstance(message.get(name), str):
            yield message[name]
    for call in message.get("tool_calls", ()):
        inner = call.get("function", call)
        yield from _leaves([inner.get("name", ""), inner.get("arguments", {})])


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from _leaves([*value, *value.values()])
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, str):
        yield value
    elif not isinstance(value, bool | None):
        yield json.dumps(value)


def _common(one: str, other: str) -> int:
    """How many characters two texts share from their beginning."""
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def _squeezed(text: str) -> str:
    """`text` without blanks, which templates trim and tokenizers change."""
    return "".join(text.split())


def _is_in(part: str, squeezed: str) -> bool:
    """Whether `part` is in a text without blanks, as it is or as JSON writes it."""
    forms = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
    return any(_squeezed(form) in squeezed for form in forms)
