"""Trains four steps, then resumes from the checkpoint after two steps and repeats the last two; run by test_survival.py.

accelerate launch --config_file launch/zero3.yaml --num_processes 2 tests/resuming.py BASES OUT

BASES holds the initial models (`same_training.save_bases`). OUT/KIND-METHOD is the uninterrupted run, OUT/KIND-METHOD-again the
resumed one. With a third folder BEGUN, only resumed runs are made, from the checkpoints in BEGUN, which may come from another
number of processes.
"""

import os
import sys
from pathlib import Path

import same_training as same
from training_data import config_of

from toolkit.distributed.ranks import exits_cleanly
from toolkit.runs.preflight import check_engine
from toolkit.training.checkpoints import RunFingerprint, check_resumable, resume_point
from toolkit.training.trainer import FineTuner, train

ROWS_A_STEP = 4
CASES = [(kind, method) for kind in same.KINDS for method in ("full", "lora")]


def steps(kind: str, method: str, bases: Path, folder: Path, begun: Path | None) -> None:
    """Trains in `folder`, from the beginning or from checkpoint-2 in `begun`."""
    settings = {"learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    args = same.arguments(folder, ROWS_A_STEP // int(os.environ.get("WORLD_SIZE", "1")), **settings)
    config = config_of(args)
    check_engine(config.engine, args)
    data, checkpoint = same.task_data(kind), None
    if begun is not None:
        checkpoint = str(resume_point(str(begun / "checkpoint-2"), folder))
        check_resumable(
            begun / "checkpoint-2",
            RunFingerprint.of(config.engine, args, data.train_fingerprint),
            allow_changed_data=False,
        )
    model = same.attach(same.load(bases / kind, method, args), kind, method)
    train(FineTuner(model, config, data), checkpoint)


@exits_cleanly
def main() -> None:
    bases, out, *begun = map(Path, sys.argv[1:])
    for kind, method in CASES:
        name = f"{kind}-{method}"
        if not begun:
            steps(kind, method, bases, out / name, None)
        steps(kind, method, bases, out / f"{name}-again", (begun or [out])[0] / name)


if __name__ == "__main__":
    main()
