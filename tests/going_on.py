"""Four steps of real training, and the last two of them again from the checkpoint in their middle; run by test_survival.py.

accelerate launch --config_file launch/zero3.yaml --num_processes 2 tests/going_on.py OUT --use_cpu

OUT/KIND-METHOD is the run that nothing interrupts, and OUT/KIND-METHOD-again the other. With BEGUN after OUT, only the other runs,
from the checkpoints in BEGUN, which may be those of more or fewer processes.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

from gradients import rows
from one_step import CASES, Writer, build

from toolkit.checkpoints import Origin, check_goes_on, resume_point
from toolkit.config import TrainArguments
from toolkit.engine import asked_engine
from toolkit.preparation import check_engine
from toolkit.ranks import exits_cleanly
from toolkit.training import FineTuner, train

ROWS_A_STEP = 4


def steps(kind: str, method: str, folder: Path, begun: Path | None) -> None:
    """The run in `folder`, from its beginning or from the checkpoint-2 in `begun`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainArguments(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS_A_STEP // processes,
        learning_rate=1e-2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    check_engine(args)
    encoder = SimpleNamespace(tokenizer=Writer())
    task = SimpleNamespace(model_kind="generating")
    data = SimpleNamespace(
        task=task, train=rows(kind), validation=rows(kind), encoder=encoder, train_fingerprint="the same"
    )
    if begun is not None:
        args.resume_from_checkpoint = str(resume_point(str(begun / "checkpoint-2"), folder))
        check_goes_on(begun / "checkpoint-2", Origin.of(asked_engine(), args, data), allow_changed_data=False)
    train(FineTuner(build(kind, method), args, data))


@exits_cleanly
def main() -> None:
    out = Path(sys.argv[1])
    begun = Path(sys.argv[2]) if sys.argv[2:3] not in ([], ["--use_cpu"]) else None
    for kind, method in CASES:
        name = f"{kind}-{method}"
        if begun is None:
            steps(kind, method, out / name, None)
        steps(kind, method, out / f"{name}-again", (begun or out) / name)


if __name__ == "__main__":
    main()
