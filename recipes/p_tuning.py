"""P-tuning: train a few embeddings before the input, made by a small network (Liu et al. 2021, arXiv:2103.10385).

    accelerate launch recipes/p_tuning.py
    accelerate launch recipes/p_tuning.py --model_name_or_path google/flan-t5-large --dataset_name knkarthick/dialogsum

Choose it over prompt tuning when that does not start to learn: the network couples the embeddings. Its sequences are as long
as those of prompt tuning, and on small models it gains as little.
"""

from toolkit.config.start import start

if __name__ == "__main__":
    start(__file__)  # checks flags and paths now; the imports below take seconds

from toolkit.config import parse_config
from toolkit.distributed.ranks import exits_cleanly
from toolkit.memory.measure import MemoryCallback
from toolkit.methods.p_tuning import PTuning
from toolkit.runs.evaluation import evaluate_by_generation
from toolkit.runs.prediction import say_prediction, show_comparison, show_prediction
from toolkit.runs.preflight import prepare
from toolkit.runs.run_folder import RunFolder
from toolkit.training.trainer import FineTuner, train


@exits_cleanly
def main() -> None:
    config = parse_config(PTuning)  # flags and YAML
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
