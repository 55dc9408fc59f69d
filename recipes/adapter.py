"""Bottleneck adapters: train a small network after each sublayer (Houlsby et al. 2019, arXiv:1902.00751).

    accelerate launch recipes/adapter.py
    accelerate launch recipes/adapter.py --model_name_or_path google/flan-t5-base --dataset_name knkarthick/dialogsum --adapter_style pfeiffer

Choose it when LoRA learns too little: an adapter is not linear, so it can learn what no change of the weights can. It costs
a little time in each step and when generating, because it cannot be merged. --adapter_style pfeiffer (Pfeiffer et al. 2020,
arXiv:2005.00247) uses half as many adapters. Loading the result needs `import toolkit.methods.adapter`; the footprint command
does this itself.
"""

from toolkit.config.start import start

if __name__ == "__main__":
    start(__file__)  # checks flags and paths now; the imports below take seconds

from toolkit.config import parse_config
from toolkit.distributed.ranks import exits_cleanly
from toolkit.memory.measure import MemoryCallback
from toolkit.methods.adapter import Adapter
from toolkit.runs.evaluation import evaluate_by_generation
from toolkit.runs.prediction import say_prediction, show_comparison, show_prediction
from toolkit.runs.preflight import prepare
from toolkit.runs.run_folder import RunFolder
from toolkit.training.trainer import FineTuner, train


@exits_cleanly
def main() -> None:
    config = parse_config(Adapter)  # flags and YAML
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
