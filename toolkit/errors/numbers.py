"""Which numbers a flag can have: one table for all flags, and a rule by type for those that it does not name."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.errors import UserError

COUNT = 10**9  # steps, rows: more would not end
SIZE = 10**6  # rows of a batch, beams, widths: more would not fit anywhere
INT = 2**31 - 1
PAIRS, NOT_FINITE = r"optim_args|\w+_(kwargs|config)", r"[=:]\s*[+-]?(nan|inf)"  # flags of several values in one text
FLOAT = 1e30

# (least, most), both possible; a least of 0.0 (a float) is itself not possible.
AT_LEAST_1, WIDTH, SEED = (1, COUNT), (1, SIZE), (0, 2**32 - 1)
BY_NAME: dict[str, tuple[float, float]] = {
    "adam_beta1": (0, math.nextafter(1, 0)),
    "adam_beta2": (0, math.nextafter(1, 0)),
    "adam_epsilon": (0, FLOAT),
    "adapter_size": WIDTH,
    "data_seed": SEED,
    "dataloader_num_workers": (0, 1000),
    "dataloader_prefetch_factor": (1, 1000),
    "ddp_bucket_cap_mb": WIDTH,
    "ddp_timeout": (1, 10**8),  # seconds
    "early_stopping_patience": AT_LEAST_1,
    "early_stopping_threshold": (0, FLOAT),
    "encoder_hidden_size": WIDTH,
    "eval_delay": (0, COUNT),
    "eval_steps": (0.0, COUNT),
    "gradient_accumulation_steps": (1, 10**4),
    "label_smoothing_factor": (0, math.nextafter(1, 0)),
    "learning_rate": (0.0, 1000.0),
    "logging_steps": (0.0, COUNT),
    "loss_chunk_tokens": (0, COUNT),
    "lora_alpha": WIDTH,
    "lora_dropout": (0, math.nextafter(1, 0)),
    "lora_r": (1, 2**14),
    "loraplus_lr_ratio": (0.0, 1e6),
    "max_eval_samples": AT_LEAST_1,
    "max_grad_norm": (0, FLOAT),
    "max_length": (1, 10**7),
    "max_steps": (-1, COUNT),
    "max_target_length": (1, 10**7),
    "max_train_samples": AT_LEAST_1,
    "mlp_tile_tokens": (0, COUNT),
    "neftune_noise_alpha": (0, 1e4),
    "num_beams": (1, 200),
    "num_processes": (1, 10**5),
    "num_shots": (0, SIZE),
    "num_train_epochs": (0.0, SIZE),
    "num_virtual_tokens": (1, 10**5),
    "per_device_eval_batch_size": WIDTH,
    "per_device_train_batch_size": WIDTH,
    "save_steps": (0.0, COUNT),
    "save_total_limit": AT_LEAST_1,
    "seed": SEED,
    "seeds": (1, 1000),
    "torch_empty_cache_steps": AT_LEAST_1,
    "train_last_layers": AT_LEAST_1,
    "warmup_ratio": (0, 1),
    "warmup_steps": (0, COUNT),
    "weight_decay": (0, 1000.0),
}
# What to give instead of the 0 or -1 by which other tools mean "all" or "none".
INSTEAD = {
    "early_stopping_patience": "to never stop early, leave the flag out",
    "max_eval_samples": "to use all rows, leave the flag out",
    "max_train_samples": "to use all rows, leave the flag out",
    "save_total_limit": "to keep every checkpoint, give a large number, such as 1000",
}


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raises UserError for the first number in `settings` (by flag name) that means nothing: not finite, or out of its range.

    A whole number that the table does not name may be -1, which libraries use for "none"; its sign is left to its library.
    """
    for name, value in settings.items():
        if isinstance(value, str) and re.match(PAIRS, name) and re.search(NOT_FINITE, value, re.IGNORECASE):
            raise UserError(f"--{name} {value} is not possible; give finite numbers")
        for number in _numbers(value):
            _check(name, number, *BY_NAME.get(name, (-INT, INT) if isinstance(number, int) else (-FLOAT, FLOAT)))


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a flag's value, which may be a list or a mapping."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _check(name: str, value: float, least: float, most: float) -> None:
    above = isinstance(least, float) and least == 0
    if least <= value <= most and not (above and value == 0):
        return
    instead = f"; {INSTEAD[name]}" if name in INSTEAD and value < 1 else ""
    kind = "a whole number" if isinstance(value, int) else "a number"
    shown = f"{value:g}" if isinstance(value, float) or abs(value) >= 10**15 else str(value)
    if most <= 1:
        allowed = "from 0 to below 1" if most < 1 else "from 0 to 1"
    elif value > most:
        allowed = f"of at most {most:,}" if most < FLOAT else "that is finite"
    elif name not in BY_NAME:
        allowed = "that is finite" if isinstance(value, float) else f"of at least {least:,}"
    else:
        allowed = "above 0" if above else f"of at least {least:,}"
    raise UserError(f"--{name} {shown} is not possible; give {kind} {allowed}{instead}")
