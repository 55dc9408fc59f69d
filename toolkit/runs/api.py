"""What `import toolkit` offers to notebooks and scripts. Each function imports what it needs when it is called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError, did_you_mean

__all__ = ["Ledger", "UserError", "load_run", "methods", "predict"]

if TYPE_CHECKING:
    from toolkit.memory.ledger import Ledger
    from toolkit.methods import Method
    from toolkit.runs.finished_run import FinishedRun

Setting = bool | float | str | Path | Sequence[float | str] | Mapping[str, Any] | None


def predict(
    method: str,
    *flags: str,
    gpu: str | None = None,
    gpu_memory: str | int | None = None,
    launch: str | Path | None = None,
    num_processes: int | None = None,
    **settings: Setting,
) -> Ledger:
    """The memory that a run of `recipes/METHOD.py` will need, without weights, data or GPU: what `footprint predict` shows.

        predict("lora", gpu="RTX 4090", model_name_or_path="meta-llama/Llama-3.2-1B", max_length=512, bf16=True)

    Args:
        method: a recipe's name; `methods()` has them.
        flags: the recipe's flags, word by word as on the command line (`"--max_length", "512"`).
        gpu: a GPU that need not be in this machine, by its usual name. Default: this machine's GPU, else its CPU.
        gpu_memory: a GPU of that much usable memory instead: `"24GiB"`, or a number of bytes.
        launch: one of several processes is predicted: a file of launch/ by its name (`"zero3"`), or the path of one.
        num_processes: how many processes the launch file starts, instead of its own number.
        settings: the recipe's flags by name, as Python values. A list gives a flag several values, a mapping is passed
            on as JSON, and None is as if the flag were not there. They win over `flags`.

    Returns:
        The ledger of the process that needs most. Sizes in bytes; `fits` compares it with the GPU's memory.

    Raises:
        UserError: for what cannot be predicted, an unknown method, card, launch file or flag, and for values that cannot be right.
    """
    if gpu and gpu_memory:
        raise UserError("--gpu and --gpu_memory exclude each other; give one of them")
    if num_processes is not None and launch is None:
        raise UserError(
            "--num_processes has no effect without --launch; add for instance --launch zero3, or leave it out"
        )
    import torch

    from toolkit.config import read_flags
    from toolkit.distributed.engine import EngineKind
    from toolkit.distributed.launch_files import ONE_PROCESS, read_launch_file
    from toolkit.memory.cuda.cards import find_card, generic_card
    from toolkit.methods import METHODS
    from toolkit.runs.prediction import PredictionJob, this_card

    if method not in METHODS:
        raise UserError(
            f"unknown method {method!r}{did_you_mean(method, METHODS)}; there are: {', '.join(sorted(METHODS))}"
        )
    named = find_card(gpu) if gpu else generic_card(str(gpu_memory)) if gpu_memory else None
    environment = ONE_PROCESS if launch is None else read_launch_file(str(launch), num_processes)
    told = read_flags(METHODS[method], [*flags, *_as_flags(settings)])
    on_cpu = {**told.from_file, **told.given}.get("use_cpu")
    job = PredictionJob(method, told, environment, named or (None if on_cpu else this_card()))
    apart = environment.engine.kind is not EngineKind.NONE and torch.cuda.is_available()
    return job.predict_apart() if apart else job.predict()


def load_run(path: str | Path) -> FinishedRun:
    """The finished run in the folder `path`: its settings, scores and measured memory, and its model, which answers texts.

        run = load_run("runs/lora-embedded-20250101-120000")
        run.scores["tuned"]
        run.generate(["#Person1#: Is it raining?"])

    The model is loaded when it is first asked for, on the GPU where there is one.

    Raises:
        UserError: where the folder is not that of a finished run, or its files are damaged.
    """
    from toolkit.runs.finished_run import FinishedRun

    return FinishedRun(Path(path))


def methods() -> dict[str, type[Method]]:
    """Every method of fine-tuning by the name of its recipe. A method's fields are its flags; `paper` is where it is from."""
    from toolkit.methods import METHODS

    return dict(METHODS)


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
