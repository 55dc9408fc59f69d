"""Prefix tuning: train keys and values before those of the input in every layer (Li and Liang 2021, arXiv:2101.00190).

    accelerate launch recipes/prefix_tuning.py
    accelerate launch recipes/prefix_tuning.py --model_name_or_path google/flan-t5-base --dataset_name knkarthick/dialogsum

Choose it for generation when one frozen model serves many tasks and a soft prompt is too weak. It needs cache for the prefix
in every layer, and cannot be combined with gradient checkpointing: on long inputs LoRA needs less memory.
"""

from toolkit.config.start import start

if __name__ == "__main__":
    start(__file__)  # checks flags and paths now; the imports below take seconds

from toolkit.config import parse_config
from toolkit.distributed.ranks import exits_cleanly
from toolkit.memory.measure import MemoryCallback
from toolkit.methods.prefix_tuning import PrefixTuning
from toolkit.runs.evaluation import evaluate_by_generation
from toolkit.runs.prediction import say_prediction, show_comparison, show_prediction
from toolkit.runs.preflight import prepare
from toolkit.runs.run_folder import RunFolder
from toolkit.training.trainer import FineTuner, train


@exits_cleanly
def main() -> None:
    config = parse_config(PrefixTuning)  # flags and YAML
    if config.predict:
        show_prediction(config)
        return
    ready = prepare(config)  # tokenizer and data; every mistake is found here, before a model loads
    run = RunFolder.create(config, ready)
    say_prediction(config)  # what the worst batch will need

    model = ready.load_model()  # with its weights
    base = evaluate_by_generation(model, ready.data, config, title="base model")

    model = config.method.attach(model)
    memory = MemoryCallback(snapshot=config.snapshot_file)
    trainer = FineTuner(model, config, ready.data, callbacks=[memory])
    train(trainer, run.checkpoint)

    tuned = evaluate_by_generation(model, ready.data, config, title="tuned model")
    show_comparison(config, memory)  # predicted and measured memory
    run.finish(config, ready, base, tuned, memory.ledger)
    if config.training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
