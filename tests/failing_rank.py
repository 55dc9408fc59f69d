"""Runs a recipe in which only rank 1 fails at its second step (KIND user or bug) or never leaves it (KIND hang), while rank 0
waits for it; or in which its parameters differ from rank 0's after the first step (KIND drift).

accelerate launch --config_file launch/ddp.yaml --num_processes 2 tests/failing_rank.py KIND TIME_FILE recipes/lora.py --use_cpu
"""

import os
import runpy
import sys
import time
from pathlib import Path

from toolkit.errors import UserError
from toolkit.training.trainer import FineTuner

kind, when, *sys.argv = sys.argv[1:]
trains = FineTuner.training_step


def fails_on_rank_1(self: FineTuner, *args, **kwargs):
    if kind != "drift" and os.environ["RANK"] == "1" and self.state.global_step == 1:
        Path(when).write_text(str(time.time()))
        while kind == "hang":
            time.sleep(1)
        raise UserError("no room is left") if kind == "user" else ZeroDivisionError("a bug")
    loss = trains(self, *args, **kwargs)
    if kind == "drift" and os.environ["RANK"] == "1":
        Path(when).write_text(str(time.time()))
        next(p for p in self.model.parameters() if p.requires_grad).data += 1e-3
    return loss


if __name__ == "__main__":
    FineTuner.training_step = fails_on_rank_1
    runpy.run_path(sys.argv[0], run_name="__main__")
