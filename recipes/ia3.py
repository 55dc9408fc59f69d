"""(IA)3: train a vector that rescales each chosen activation (Liu et al. 2022, arXiv:2205.05638).

    accelerate launch recipes/ia3.py
    accelerate launch recipes/ia3.py --model_name_or_path google/flan-t5-base --dataset_name knkarthick/dialogsum

Choose it for the smallest adapter, a tenth of LoRA's size, when the model already knows something about the task. It needs as
much memory for activations as LoRA, and a high learning rate. It can be merged into weights that are not quantized.
"""

from toolkit.config.start import start

if __name__ == "__main__":
    start(__file__)  # checks flags and paths now; the imports below take seconds

from toolkit.config import parse_config
from toolkit.distributed.ranks import exits_cleanly
from toolkit.memory.measure import MemoryCallback
from toolkit.methods.ia3 import IA3
from toolkit.runs.evaluation import evaluate_by_generation
from toolkit.runs.prediction import say_prediction, show_comparison, show_prediction
from toolkit.runs.preflight import prepare
from toolkit.runs.run_folder import RunFolder
from toolkit.training.trainer import FineTuner, train


@exits_cleanly
def main() -> None:
    config = parse_config(IA3)  # flags and YAML
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
