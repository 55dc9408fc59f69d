"""Trains a method like its recipe, without prediction and scoring, which take most of a short run's time.

python tests/train_only.py [full|lora] --use_cpu --max_steps 4 --output_dir runs/trained
"""

import sys

from toolkit.config import parse_config
from toolkit.distributed.ranks import exits_cleanly
from toolkit.methods.full import Full
from toolkit.methods.lora import Lora
from toolkit.runs.preflight import prepare
from toolkit.runs.run_folder import RunFolder
from toolkit.training.trainer import FineTuner, train


@exits_cleanly
def main() -> None:
    method = {"full": Full, "lora": Lora}[sys.argv.pop(1) if sys.argv[1] in ("full", "lora") else "lora"]
    config = parse_config(method)
    ready = prepare(config)
    run = RunFolder.create(config, ready)
    model = config.method.attach(ready.load_model())
    train(FineTuner(model, config, ready.data), run.checkpoint)


if __name__ == "__main__":
    main()
