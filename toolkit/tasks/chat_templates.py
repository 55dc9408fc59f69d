"""Chat templates for tokenizers that have none, and a limit for those that do not end."""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from toolkit.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)  # after Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca
NAMED = {"chatml": CHATML, "alpaca": ALPACA}
MOST_BYTES = 1 << 20  # of a file with a template; the longest of well-known models are some 20 KB
SECONDS = 10.0  # for one short conversation, which takes milliseconds
ROOM = 2 << 30  # bytes that it may need
_ENDED: set[str] = set()  # templates that were tried in this process


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Gives `tokenizer` the chat template `name` (chatml, alpaca or a file), and returns remarks for the user.

    No token is added, because a frozen model could not learn it: where the tokenizer has no <|im_end|>, its end-of-text token
    ends a turn.

    Raises: UserError for a tokenizer that has a template already (a file replaces it), and for a file that holds none.
    """
    remarks = []
    if name not in NAMED:
        template = _read(name)
        if tokenizer.chat_template:
            remarks.append(f"--chat_template {name} replaces the tokenizer's own chat template")
        tokenizer.chat_template = template
        return remarks
    if tokenizer.chat_template:
        raise UserError(
            f"--chat_template {name}: {tokenizer.name_or_path} has a chat template of its own, which its model knows; leave the flag "
            "out, or give a file to replace it"
        )
    template = NAMED[name]
    if name == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        template = template.replace("<|im_end|>", "{{ eos_token }}")
        remarks.append(f"chatml: the tokenizer has no <|im_end|>, so {tokenizer.eos_token} ends each turn")
    tokenizer.chat_template = template
    return remarks


def _read(name: str) -> str:
    file = Path(name)
    try:
        found = file.is_file()
        text = (
            file.read_bytes()[: MOST_BYTES + 1].decode("utf-8-sig")
            if found and file.stat().st_size <= MOST_BYTES
            else None
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--chat_template {name[:160]}: cannot be read ({' '.join(str(error).split())[:120]})"
        ) from None
    if not found:
        raise UserError(f"--chat_template {name[:160]}: no such file; give one, or chatml or alpaca")
    if text is None:
        raise UserError(
            f"--chat_template {name}: larger than {MOST_BYTES:,} bytes; give a file with one Jinja template"
        )
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except (TemplateError, RecursionError) as error:
        raise UserError(f"--chat_template {name}: no Jinja template ({' '.join(str(error).split())[:160]})") from None
    if "messages" not in text:
        raise UserError(
            f"--chat_template {name}: it does not use `messages`, so it writes no conversation; give another"
        )
    return text


def check_template_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if the chat template does not write a short conversation in `SECONDS` and `ROOM` bytes.

    It is tried in a process of its own, which can be ended. On Windows, which cannot fork, it is not tried.
    """
    template = str(tokenizer.chat_template)
    if sys.platform == "win32" or template in _ENDED:
        return
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of processes with threads; the child only renders, and exits
        child = os.fork()
    if child == 0:
        _try_and_exit(tokenizer)
    until = time.monotonic() + SECONDS
    wait = 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise UserError(
                f"{tokenizer.name_or_path}: its chat template does not end: it was stopped after {SECONDS:.0f} s with two short messages; "
                "give another with --chat_template FILE"
            )
        time.sleep(wait)
        wait = min(0.1, wait * 2)
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status):
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template needs more than {ROOM >> 30} GiB for two short messages; give another with "
            "--chat_template FILE"
        )
    _ENDED.add(template)


def _try_and_exit(tokenizer: PreTrainedTokenizerBase) -> None:
    """In the child: writes a conversation, and exits with 1 if memory does not suffice. Other errors are the parent's to tell."""
    code = 0
    try:
        if sys.platform == "linux":
            import resource

            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
        tokenizer.apply_chat_template(messages, tokenize=False)
        tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    except MemoryError:
        code = 1
    except BaseException:  # nothing may leave the child
        code = 0
    finally:
        os._exit(code)
