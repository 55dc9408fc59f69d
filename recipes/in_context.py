"""In-context learning: put examples into the prompt of the untouched model (Brown et al. 2020, arXiv:2005.14165).

    accelerate launch recipes/in_context.py
    accelerate launch recipes/in_context.py --model_name_or_path google/flan-t5-base --dataset_name knkarthick/dialogsum --num_shots 0 1 4

Choose it before any training: a method must beat what the model does with no or a few examples. It needs no training, but each
answer processes the examples again. The table shows their cost in tokens and in time.
"""

from toolkit.config.start import start

if __name__ == "__main__":
    start(__file__)  # checks flags and paths now; the imports below take seconds

from toolkit.config import parse_config
from toolkit.distributed.ranks import exits_cleanly
from toolkit.methods.in_context import InContext
from toolkit.runs.in_context import answer_in_context, finish_in_context
from toolkit.runs.prediction import show_prediction
from toolkit.runs.preflight import prepare
from toolkit.runs.run_folder import RunFolder


@exits_cleanly
def main() -> None:
    config = parse_config(InContext)  # flags and YAML
    if config.predict:
        show_prediction(config)
        return
    ready = prepare(config)  # tokenizer and data; every mistake is found here, before a model loads
    run = RunFolder.create(config, ready)

    model = ready.load_model()  # with its weights
    finish_in_context(run, ready, answer_in_context(model, ready, config))


if __name__ == "__main__":
    main()
