"""Chat: conversations in the tokenizer's own chat template, with the loss only on the assistant's tokens."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from toolkit.errors import UserError
from toolkit.models.heads import ModelKind
from toolkit.models.losses import IGNORE_INDEX
from toolkit.tasks.base import NothingToLearn
from toolkit.tasks.chat_templates import check_template_ends
from toolkit.tasks.summarization import Summarization
from toolkit.tasks.tokenization import PromptTokenizer, Truncation

Message = dict[str, Any]  # {"role": "user", "content": "..."}, and other keys that templates use: tool_calls, name ...
# keys of reasoning; transformers treats them as equal
REASONING = ("reasoning_content", "thinking", "reasoning")
FORM = 'a list of {"role": ..., "content": ...}'
REFUSALS = (Exception,)  # a template is a program of its author, and may raise anything
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
}
ROLES |= {
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "ai": "assistant",
}
USUAL_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
PROBE: Message = {"role": "assistant", "content": "\u00a7"}  # an answer that shows what the template writes before it


REWRITTEN = (
    "the tokenizer's chat template rewrites earlier turns (reasoning, for instance) when later ones follow, or its generation "
    "prompt does not match the way it writes this answer, so the assistant's tokens cannot be found; give conversations with one "
    "turn of the assistant, remove the reasoning, or name another template with --chat_template"
)


class Conversation(NamedTuple):
    """The messages, and the JSON schemas of the tools that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def upto(self, number: int) -> "Conversation":
        """The conversation's first `number` messages."""
        return Conversation(self.messages[:number], self.tools)

    def then(self, *messages: Message) -> "Conversation":
        """The conversation followed by `messages`."""
        return Conversation([*self.messages, *messages], self.tools)


@dataclass
class _Turn:
    """A turn of the assistant, and its place in the text that the template writes; places are in characters.

    A label token begins before `end` and ends at or before `same`. After `same`, the text of the whole conversation differs
    from the text of the conversation that ends with this turn.
    """

    message: Message
    begin: int | None = None  # None if the template writes the turn differently from an answer
    end: int = 0
    same: int = 0
    missing: str | None = None  # a part of the message that the template leaves out

    @property
    def is_learned(self) -> bool:
        return self.begin is not None and self.missing is None and _has_content(self.message)


@dataclass(frozen=True)
class ChatPromptTokenizer(PromptTokenizer):
    """Encodes conversations with the tokenizer's chat template.

    Raises: UserError if the tokenizer has no chat template, or no fast form (only that gives each token's position).
    """

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.tokenizer.name_or_path}: its tokenizer has no chat template, so it does not say how a conversation "
                "is written; add --chat_template chatml (or alpaca, or a file), or give a chat model (or its tokenizer with "
                "--tokenizer_name)"
            )
        check_template_ends(self.tokenizer)
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{self.tokenizer.name_or_path}: its tokenizer has no fast form, which is needed to find the assistant's "
                "tokens; give one that has it with --tokenizer_name, or use --task summarization"
            )

    def prompt(self, text: str | list[Message] | Conversation, room: int | None = None) -> tuple[list[int], int]:
        """The ids of a conversation up to the assistant's answer, and how many were cut off at its beginning.

        Before truncation they are exactly the ids that precede the answer in a training row.
        """
        if room is None:
            room = self.max_length - self.max_target_length
        question = _conversation(text)
        written = self._up_to_answer(question)
        ids, _, _ = self._ids(written, _begins(self._turns(question, written)))
        return ids[-room:], max(0, len(ids) - room)

    def row(self, text: list[Message] | Conversation, target: str | Message, lost: Truncation) -> dict[str, Any]:
        """The ids of the whole conversation, cut to `max_length`; labels are masked except in the assistant's turns.

        A turn begins after the template's generation prompt and ends with its end-of-turn token. An earlier turn that the
        template writes differently once others follow stays masked, because the model never has to generate it that way.

        Raises: UserError if the template leaves out a part of the last turn.
        """
        whole = _conversation(text).then(_answer(target))
        written = self._written(whole)
        turns = self._turns(whole, written)
        ids, labels = self._labelled(written, turns, [turn for turn in turns if turn.is_learned])
        lost.masked_turns += sum(_has_content(turn.message) and not turn.is_learned for turn in turns)
        lost.unusual_roles.update(m["role"] for m in whole.messages if m["role"] not in USUAL_ROLES)
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
        """The assistant's words; if the template adds to them (reasoning, tool calls), its whole text without special tokens."""
        whole = _conversation(text).then(_answer(target))
        written = self._written(whole)
        turns = self._turns(whole, written)
        _, labels = self._labelled(written, turns, turns[-1:])
        learned = self.tokenizer.decode([label for label in labels if label != IGNORE_INDEX], skip_special_tokens=True)
        said = whole.messages[-1].get("content", "")
        return said if _squeezed(learned) == _squeezed(said) else learned.strip()

    def target_ids(self, target: str | Message) -> list[int]:
        """The ids of the assistant's words, without what the template adds."""
        return self.tokenizer(_answer(target)["content"], add_special_tokens=False, verbose=False).input_ids

    def end_tokens(self) -> list[int]:
        """The last special or added token that the template writes after the assistant's words, if there is one.

        It is the last label of each turn. Often it is not the tokenizer's end-of-text token (ChatML's <|im_end|>).
        """
        try:
            written = self._written(Conversation([{"role": "user", "content": "Hi."}, PROBE]))
        except UserError:
            return []  # the template refuses so simple a conversation
        _, found, after = written.rstrip().rpartition(PROBE["content"])
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        ids = self.tokenizer(after, add_special_tokens=False).input_ids
        return [token for token in ids if found and token in special][-1:]

    def remarks(self) -> list[str]:
        """Remarks on properties of the template that make answers here differ from those of other tools."""
        plain = Conversation([{"role": "user", "content": "Hi."}])
        try:
            dropped = self._written(plain, add_generation_prompt=True)[len(self._up_to_answer(plain)) :]
        except UserError:
            return []
        remarks = []
        if dropped.strip():
            remarks.append(
                f"the chat template's generation prompt has {dropped!r}, which it leaves out once the answer follows; so prompts "
                "here are without it"
            )
        if not self.end_tokens():
            remarks.append(
                "the chat template ends a turn without a special token, so answers may continue up to --max_target_length"
            )
        return remarks

    def _labelled(self, written: str, turns: list[_Turn], learned: list[_Turn]) -> tuple[list[int], list[int]]:
        """The ids of a whole conversation, and labels that are masked outside the turns in `learned`.

        Raises: UserError if the last turn cannot be learned.
        """
        last = turns[-1]
        if last.begin is None:
            raise UserError(REWRITTEN)
        if last.missing is not None:
            raise UserError(
                "the tokenizer's chat template leaves out a part of the assistant's last turn "
                f"({' '.join(last.missing.split())[:60]!r}), so it could not be learned; remove it from the data, or name a "
                "template that writes it with --chat_template"
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
        """The assistant's turns in a conversation; `written` is its text, whole or up to the answer."""
        turns = []
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            turns.append(turn := _Turn(message))
            if number == 0:
                continue  # no prompt precedes it
            upto = self._written(conversation.upto(number + 1))
            before = self._up_to_answer(conversation.upto(number))
            same = _common(upto, written)
            there = _squeezed(upto[len(before) :])
            turn.missing = next((part for part in _parts(message) if not _is_in(part, there)), None)
            stays = same == len(upto) or all(
                _is_in(part, _squeezed(upto[len(before) : same])) for part in _parts(message)
            )
            if stays and upto.startswith(before):
                turn.begin, turn.end = len(before), len(upto.rstrip())
                turn.same = len(written) if same == len(upto) else same
        return turns

    def _up_to_answer(self, conversation: Conversation) -> str:
        """The conversation and the generation prompt, up to where the text with an answer begins to differ from it."""
        prompt = self._written(conversation, add_generation_prompt=True)
        kept = _common(prompt, self._written(conversation.then(PROBE)))
        if kept < _common(prompt, self._written(conversation)):
            raise UserError(REWRITTEN)
        return prompt[:kept]

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template only writes content that is a list of parts, as templates of vision models do."""

        def is_written(content: Any) -> bool:
            messages = [{"role": "user", "content": content}]
            try:
                return PROBE["content"] in self.tokenizer.apply_chat_template(messages, tokenize=False)
            except REFUSALS:
                return False

        return not is_written(PROBE["content"]) and is_written(_in_parts(PROBE["content"]))

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before a text, as SentencePiece does."""
        return self.tokenizer.tokenize("a")[0].startswith("\u2581")

    def _ids(self, written: str, begins: Sequence[int]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """The ids of `written`, the (first, last) characters of each, and how many ids come before each of `begins`.

        The ids before a begin are those of the prompt tokenized by itself. If the tokenizer would merge the end of a prompt
        with the first word of the answer (most often a space), the answer is tokenized separately, as the model generates it.
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
        """The ids of `written` from character `at` on, and the (first, last) characters of each."""
        text, lead = written[at:], 0
        if at and self._adds_space:
            # otherwise the tokenizer would add a space
            text, lead = f"\n{text}", len(self.tokenizer("\n", add_special_tokens=False).input_ids)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        shift = at - (lead > 0)
        return encoded.input_ids[lead:], [
            (first + shift, last + shift) for first, last in encoded.offset_mapping[lead:]
        ]

    def _written(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        messages = conversation.messages
        try:
            return self._apply(messages, conversation.tools, add_generation_prompt)
        except REFUSALS as error:  # templates refuse roles that they do not know, such as system
            reason = " ".join(str(error).split())[:200]
        if any(message.get("tool_calls") for message in messages):
            with suppress(*REFUSALS):  # some templates expect the arguments of a call as text
                as_text = [_with_arguments(message, json.dumps) for message in messages]
                return self._apply(as_text, conversation.tools, add_generation_prompt)
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the tokenizer's chat template refuses a conversation of {roles}: {reason}")

    def _apply(self, messages: list[Message], tools: list[dict[str, Any]] | None, ask: bool) -> str:
        if self._takes_parts:
            messages = [message | {"content": _in_parts(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)


class Chat(Summarization):
    """Answers in a conversation; ROUGE scores the assistant's last turn."""

    name: ClassVar[str] = "chat"
    one_target: ClassVar[bool] = False
    model_kind: ClassVar[ModelKind] = "decoder"
    flags: ClassVar[dict[str, Any]] = {
        "messages_column": "messages",
        "tools_column": "tools",
        "system_column": "system",
        "prompt_column": None,
        "response_column": None,
        "prompt_template": None,
        "chat_template": None,
        "max_target_length": 128,
        "num_beams": 1,
    }
    optional: ClassVar[tuple[str, ...]] = ("tools_column", "system_column")
    prompt_tokenizer: ClassVar[type[PromptTokenizer]] = ChatPromptTokenizer
    scoring: ClassVar[str] = "ROUGE F-measures with stemming, of the last turn of each conversation"

    def column_flags(self, given: dict[str, Any]) -> list[str]:
        """prompt_column and response_column if they are set, otherwise messages_column and tools_column."""
        if given.get("prompt_column") or given.get("response_column"):
            return ["system_column", "prompt_column", "response_column"]
        return ["system_column", "tools_column", "messages_column"]

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError if only one of --prompt_column and --response_column is set, or both forms of conversation are."""
        named = [flag for flag in ("prompt_column", "response_column") if given.get(flag)]
        if given.get("prompt_template") and "response_column" not in named:
            raise UserError(
                "--prompt_template has no effect in a chat without --response_column; add it or leave it out"
            )
        if len(named) == 1 and not given.get("prompt_template"):
            raise UserError(f"--{named[0]} is half of a pair; give both --prompt_column and --response_column")
        for flag in ("messages_column", "tools_column"):
            if named and given.get(flag):
                raise UserError(f"--{flag} and --prompt_column exclude each other; give one form of conversation")

    def pair(self, row: dict[str, Any]) -> tuple[Conversation, Message]:
        """The conversation before the assistant's last turn with content, and that turn.

        Raises: UserError for a value that is not a list of messages, or has no such turn.
        """
        messages: list[Message]
        if "prompt_column" in row:
            both = [(row["prompt_column"], "user"), (row["response_column"], "assistant")]
            messages = [one for value, role in both for one in _turns_of(value, role)]
        else:
            column = row["messages_column"]
            turns_found = listed(column)
            if turns_found is None or not all(_has_role(message) for message in turns_found):
                raise UserError(f"its conversation is not {FORM}, but {str(column)[:80]!r}")
            messages = [_message(message) for message in turns_found]
        system = row.get("system_column")
        if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        tools = None
        if row.get("tools_column"):
            tools = listed(row["tools_column"])
            if tools is None:
                raise UserError(
                    f"its tools are not a list of JSON schemas, but {str(row['tools_column'])[:80]!r}; name another --tools_column"
                )
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant" and _has_content(message)]
        if not turns:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
            raise NothingToLearn(
                f"its conversation has no turn of the role assistant (it has {roles}) with content and a weight"
            )
        if turns[-1] == 0:
            raise NothingToLearn(
                "its conversation begins with the only turn of the role assistant, so no prompt precedes it"
            )
        return Conversation(messages[: turns[-1]], tools or None), messages[turns[-1]]

    def shown(self, text: Conversation) -> str:
        """One line for each turn; for a single turn only its words, so that `footprint generate` accepts them."""
        if len(text.messages) == 1:
            return str(text.messages[0]["content"])
        return "\n".join(
            f"{message['role']}: {message['content'] or json.dumps(message.get('tool_calls', ''))}"
            for message in text.messages
        )

    def reference(
        self, prompt_tokenizer: PromptTokenizer, text: Conversation, target: Message, prompt: Sequence[int]
    ) -> str:
        """The assistant's last turn, as a model that learned it would write it."""
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


def listed(value: Any) -> list[dict[str, Any]] | None:
    """The objects of a list, which may be given as JSON text; None for any other value."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else None


def _has_role(message: dict[str, Any]) -> bool:
    role = message.get("role", message.get("from"))
    return isinstance(role, str) and bool(role)


def _turns_of(value: Any, role: str) -> list[Message]:
    """The messages in a column of prompts or answers: a text is one message of `role`, a list holds messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = listed(value)
    if turns is None or not all(_has_role(message) for message in turns):
        raise UserError(f"its column has {str(value)[:80]!r}, which is neither text nor {FORM}; name another column")
    return [_message(message) for message in turns]


def _message(message: Message) -> Message:
    """A message as templates expect it: content as text, arguments of calls as objects, no null values.

    ShareGPT's keys (from, value) and the names of its roles become role, content, user, assistant and tool.

    Raises: UserError for content that is not text, and NothingToLearn for a message of a user or a system without any.
    """
    message = {name: value for name, value in message.items() if value is not None}
    if "role" not in message:
        keys = {"from": "role", "value": "content"}
        message = {keys.get(name, name): value for name, value in message.items()}
    message["role"] = ROLES.get(message["role"].lower(), message["role"])
    content = message.get("content", "" if message["role"] not in ("system", "user") else None)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if other := next((part for part in content if not isinstance(part.get("text"), str)), None):
            raise UserError(
                f"its conversation has a part of the type {other.get('type')!r}, and only text can be learned"
            )
        content = "".join(part["text"] for part in content)
    if content is None:
        raise NothingToLearn(f"a message of the role {message['role'][:40]} has no content")
    if not isinstance(content, str):
        raise UserError(f"its conversation is not {FORM}, but has a message {str(message)[:80]!r}")
    return _with_arguments(message | {"content": content}, _parsed)


def _with_arguments(message: Message, change: Any) -> Message:
    """`message` with `change` applied to the arguments of each tool call."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict):
            raise UserError(f"its conversation has a tool call that is not an object: {str(call)[:80]!r}")
        inner = inner | {"arguments": change(inner["arguments"])} if "arguments" in inner else inner
        calls.append(call | {"function": inner} if "function" in call else inner)
    return message | {"tool_calls": calls}


def _parsed(arguments: Any) -> Any:
    """The arguments of a call as an object, if they are the JSON text of one, as in OpenAI's format."""
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    return arguments


def _has_content(message: Message) -> bool:
    """Whether a turn has content and should be learned (in OpenAI's format, weight 0 excludes a turn)."""
    return message.get("weight") != 0 and any(part.strip() for part in _parts(message))


def _parts(message: Message) -> Iterator[str]:
    """All text in a turn of the assistant: words, reasoning, and the names and arguments of tool calls."""
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
    """The length of the common prefix of two texts, in characters."""
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def _squeezed(text: str) -> str:
    """`text` without whitespace, which templates trim and tokenizers change."""
    return "".join(text.split())


def _is_in(part: str, squeezed: str) -> bool:
    """Whether `part` is in the whitespace-free text `squeezed`, unchanged or JSON-escaped."""
    forms = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
    return any(_squeezed(form) in squeezed for form in forms)
