"""Names of models on the Hugging Face hub: what a name may look like, and whether the hub can be asked for it."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from toolkit.errors import UserError
from toolkit.models import catalogue
from toolkit.seams import patched

_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(.+)", re.IGNORECASE)
TOKENIZER_FILE = "tokenizer_config.json"  # every tokenizer has it
_PATIENCE = 2.0  # seconds; with the imports, an unknown name is refused within three


def hub_id(name: str, of: str = "model") -> str:
    """`"https://huggingface.co/owner/name/tree/main"` -> `"owner/name"`; a name that is no page of the hub unchanged.

    `of` is "model" or "data set"; pages of data sets begin with https://huggingface.co/datasets/.

    Raises: UserError for a page of the hub that is something else, and for one of another branch than main.
    """
    if name.startswith("hf://"):
        name = f"https://huggingface.co/{name.removeprefix('hf://')}"
    elif not name.startswith((".", "/", "~")) and "://" not in name:
        name = re.sub("/{2,}", "/", name.rstrip("/"))
    page = _PAGE.fullmatch(name.strip())
    if page is None or name.lower().endswith(".gguf"):
        return name
    parts = re.split(r"[?#]", page[1])[0].strip("/").split("/")
    is_data = parts[0] == "datasets"
    if is_data != (of == "data set") or parts[0] in ("spaces", "collections", "papers", "docs"):
        raise UserError(f"{name} is not the page of a {of}; give a {of}'s page or its id, user/name")
    parts = parts[is_data:]
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve") and parts[3] != "main":
        how = f"give --model_name_or_path {parts[0]}/{parts[1]} --model_revision {parts[3]}"
        raise UserError(
            f"{name} is another version than main; {'data sets are read from main alone' if is_data else how}"
        )
    return "/".join(parts[:2])


def did_you_mean(name: str) -> str:
    """`" (did you mean meta-llama/Llama-3.2-3B?)"` with names of the catalogue that are close to `name`, or an empty string."""
    near = [known for known in catalogue.similar(name) if known.lower() != name.lower()]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def unreachable(name: str) -> str:
    """One line for a model that is not in the local cache while the hub cannot be reached."""
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    return (
        f"{name} is not in the local cache and {why}{did_you_mean(name)}; go online once, or give a local folder (for a prediction "
        "one with the model's config.json is enough; footprint models lists those that need none)"
    )


def check_reachable(name: str, revision: str | None = None, file: str = "config.json") -> None:
    """Asks once whether the hub can be reached, unless `file` of the model `name` is in the local cache: the hub's library would ask
    six times.

    What the hub answers does not matter here: reading the config says it better.

    Raises: UserError if the hub cannot be reached, or if no model can have this name.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"--model_name_or_path {name!r} is neither a folder nor a hub id{did_you_mean(name)}; give user/name, such as "
            "meta-llama/Llama-3.2-1B"
        ) from None
    if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return
    if not hub_is_reachable():
        raise UserError(unreachable(name))


@cache
def hub_is_reachable() -> bool:
    """Whether the hub answers within `_PATIENCE` seconds; always False in the libraries' own offline mode (HF_HUB_OFFLINE).

    It is asked in a thread, because looking up a name can take longer than the timeout of a request.
    """
    if constants.is_offline_mode():
        return False
    answered = []

    def ask() -> None:
        with suppress(Exception):  # of a proxy, a certificate, a name that does not resolve
            answer = get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            answered.append(answer.status_code < 500)  # otherwise a gateway says that it is not there

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return any(answered)


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """While open, the libraries of the hub use only their caches if the hub cannot be reached: they do not retry."""
    if constants.is_offline_mode() or hub_is_reachable():
        yield
        return
    with patched("huggingface_hub's offline mode", True), patched("offline mode of datasets", True):
        yield
