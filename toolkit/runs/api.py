"""The Python API behind `import toolkit`. Each function imports what it needs when it is called."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError
from toolkit.units import parse_bytes

__all__ = ["Ledger", "UserError", "load_run", "methods", "predict"]

if TYPE_CHECKING:
    from toolkit.memory.ledger import Ledger
    from toolkit.methods import Method
    from toolkit.runs.finished_run import FinishedRun

ON_CPU = (
    "predicted for this machine's CPU, because PyTorch sees no GPU; --gpu NAME or --gpu_memory SIZE predicts a card"
)
Setting = bool | float | str | Path | Sequence[float | str] | Mapping[str, Any] | None


def predict(
    method: str,
    *flags: str,
    gpu: str | None = None,
    gpu_memory: str | int | None = None,
    launch: str | Path | None = None,
    num_processes: int | None = None,
    host_memory: str | int | None = None,
    disk: str | int | None = None,
    advise: bool = False,
    **settings: Setting,
) -> Ledger:
    """Predicts the memory of a run of `recipes/METHOD.py`, without weights, data or GPU. `footprint predict` shows the same.

        predict("lora", gpu="RTX 4090", model_name_or_path="meta-llama/Llama-3.2-1B", max_length=512, bf16=True)

    Args:
        method: a recipe's name; `methods()` lists them.
        flags: the recipe's flags, word by word as on the command line (`"--max_length", "512"`).
        gpu: the usual name of a GPU, which need not be in this machine. Default: this machine's GPU, or its CPU without one. With
            `launch`, "2x RTX 3090" also gives the number of processes.
        gpu_memory: instead of `gpu`, a GPU with this much usable memory: `"24GiB"`, or a number of bytes; `"24GB"` or `24` is a
            card sold as 24 GB.
        launch: predicts one of several processes: the name of a file of launch/ (`"zero3"`), or a path.
        num_processes: the number of processes, instead of the launch file's own.
        host_memory, disk: what the machine has free, `"32GiB"` or a number of bytes. Default: what this machine has free, unless `gpu`,
            `gpu_memory` or `launch` say that the run is elsewhere; then the needs are not compared.
        advise: where the run does not fit, search the nearest setting that does by more predictions; the last warning names it.
            Progress is printed on standard error. A note says what --kbit_upcast all costs, by another prediction.
        settings: the recipe's flags by name, as Python values. A list gives a flag several values, a mapping becomes JSON,
            and None leaves the flag out. They override `flags`.

    Returns:
        The ledger of the process that needs the most memory. Sizes are bytes; `fits` compares it with the GPU's memory, and
        `resources` with the host's memory and the disks.

    Raises:
        UserError: for an unknown method, card, launch file or flag, for values that cannot be right, and for a run whose
            memory cannot be predicted.
    """
    given: dict[str, Any] = {
        "gpu": gpu,
        "gpu_memory": gpu_memory,
        "launch": launch,
        "host_memory": host_memory,
        "disk": disk,
    }
    for flag, value in given.items():
        if value == "":
            raise UserError(f"--{flag} is empty; give it a value, or leave it out")
    if gpu and gpu_memory:
        raise UserError("--gpu and --gpu_memory exclude each other; give one of them")
    if gpu and launch is not None:  # "2x RTX 3090": each process has one of them
        from toolkit.memory.cuda.cards import split_count

        count, gpu = split_count(gpu)
        if count > 1 and num_processes not in (None, count):
            raise UserError(
                f"--gpu names {count} cards, --num_processes {num_processes}; give the same number, or one card"
            )
        num_processes = count if count > 1 else num_processes
    if num_processes is not None and launch is None:
        raise UserError(
            "--num_processes has no effect without --launch; add for instance --launch zero3, or leave it out"
        )
    given |= {"host_memory": size_of("host_memory", host_memory), "disk": size_of("disk", disk)}
    words = [*flags, *_as_flags(settings)]
    _check_model_name(words)
    from toolkit.runs.prediction_cache import cached

    asked = given | {"method": method, "gpu": gpu, "num_processes": num_processes, "advise": advise}
    return cached(asked, words, lambda: _predict(words=words, **asked))


def _predict(
    method: str,
    words: Sequence[str],
    gpu: str | None,
    gpu_memory: str | int | None,
    launch: str | Path | None,
    num_processes: int | None,
    host_memory: int | None,
    disk: int | None,
    advise: bool,
) -> Ledger:
    """`predict`, of arguments that were checked; sizes in bytes."""
    import torch

    from toolkit.models.late_compile import compiled_at_first_call

    with compiled_at_first_call():
        import peft  # noqa: F401

    from toolkit.config import configure, read_flags
    from toolkit.config.start import say
    from toolkit.distributed.engine import EngineKind
    from toolkit.distributed.launch_files import ONE_PROCESS, read_launch_file
    from toolkit.memory.cuda.cards import find_card, generic_card
    from toolkit.methods import method_named
    from toolkit.runs.prediction import PredictionJob, cost_of_upcast, nearest_fit, this_card
    from toolkit.runs.resources import with_budgets

    recipe = method_named(method)
    named = find_card(gpu) if gpu else generic_card(str(gpu_memory)) if gpu_memory else None
    environment = ONE_PROCESS if launch is None else read_launch_file(str(launch), num_processes)
    parsed = read_flags(recipe, words)
    on_cpu = {**parsed.from_file, **parsed.given}.get("use_cpu")
    job = PredictionJob(method, parsed, environment, named or (None if on_cpu else this_card()), reads_data=True)
    apart = environment.engine.kind is not EngineKind.NONE and torch.cuda.is_available()
    if advise:
        say("tracing two training steps; of a large model each step takes seconds", sys.stderr)
    run = PredictionJob.predict_in_subprocess if apart else PredictionJob.predict
    ledger = run(job)
    here = configure(recipe, parsed) if named is None and launch is None else None
    ledger = replace(ledger, resources=with_budgets(ledger.resources, here, host_memory, disk))
    if job.card is None and not on_cpu:
        ledger = replace(ledger, warnings=(*ledger.warnings, ON_CPU))
    if not advise:
        return ledger
    if cost := cost_of_upcast(job, ledger, run):
        ledger = replace(ledger, notes=(*ledger.notes, cost))
    if ledger.fits_device:
        return ledger
    advice = nearest_fit(job, ledger, run)
    if short := [resource.name for resource in ledger.resources if not resource.fits]:
        advice = f"of the card alone: {advice}; it changes nothing in {' and '.join(short)}"
    return replace(ledger, warnings=(*ledger.warnings, advice))


def size_of(flag: str, size: str | int | None) -> int | None:
    """The bytes that `flag` gives; None without it. Raises: UserError for what is no size, and for text without a unit."""
    if isinstance(size, str) and size.strip().isdigit():
        raise UserError(f"--{flag} {size} has no unit; write for instance --{flag} {size.strip()}GiB")
    try:
        return None if size is None else parse_bytes(str(size))
    except UserError as error:
        raise UserError(f"--{flag}: {error}") from None


def load_run(path: str | Path) -> FinishedRun:
    """Loads the finished run in the folder `path`: settings, scores, measured memory, and the model, for generation.

        run = load_run("runs/lora-embedded-20250101-120000")
        run.scores["tuned"]
        run.generate(["#Person1#: Is it raining?"])

    The model is loaded at its first use, on the GPU if there is one.

    Raises:
        UserError: if the folder is not that of a finished run, or its files are damaged.
    """
    from toolkit.runs.finished_run import FinishedRun

    return FinishedRun(Path(path))


def methods() -> dict[str, type[Method]]:
    """Every fine-tuning method, by its recipe's name. A method's fields are its flags; `paper` is its source."""
    from toolkit.methods import METHODS

    return dict(METHODS)


def _check_model_name(words: Sequence[str]) -> None:
    """Checks the model that the flags `words` name before PyTorch is imported, so that a misspelt name is refused at once.

    Raises: UserError for a name that no model can have, and for one that is not known here while the hub cannot be reached.
    """
    from toolkit.models import catalogue
    from toolkit.models.arguments import looks_like_path
    from toolkit.models.hub import check_reachable, hub_id
    from toolkit.models.stored import check_name
    from toolkit.runs.prediction_cache import flag_values

    values = dict(flag_values(words))
    name = hub_id(values.get("model_name_or_path", ""))
    if name and not looks_like_path(name) and catalogue.find(name) is None:
        check_name(name)
        check_reachable(name, values.get("model_revision"))


def _as_flags(settings: Mapping[str, Setting]) -> list[str]:
    """`{"max_length": 512, "bf16": True}` -> `["--max_length=512", "--bf16", "true"]`."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words += [f"--{name}", str(value).lower()]
        elif isinstance(value, Mapping):
            words += [f"--{name}", json.dumps(dict(value))]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")
    return words
