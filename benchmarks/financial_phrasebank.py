"""mt0-large on financial_phrasebank with each method: repeats the table of a write-up and shows its figures next to ours.

    python benchmarks/financial_phrasebank.py --dataset_name Sentences_AllAgree.txt
    python benchmarks/financial_phrasebank.py --dataset_name FILE --model_name_or_path MODEL --max_train_samples 64 --seeds 1

The data set's loading script no longer runs (datasets 4 runs no scripts), so --dataset_name is its file with lines
`sentence@label`, from https://huggingface.co/datasets/takala/financial_phrasebank. Every flag of `footprint compare` and of the
recipes works here and overrides the write-up's settings; the output lists what differs then.
"""

import sys

from published import beside, redo

from toolkit.distributed.ranks import exits_cleanly
from toolkit.errors import UserError

METHODS = ("lora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3")
SETTINGS = {
    "": {
        "task": ["classification"],
        "model_name_or_path": ["bigscience/mt0-large"],
        "per_device_train_batch_size": ["8"],
    },
    "lora": {"lora_r": ["8"], "lora_target_modules": ["q", "v"]},
    "prompt_tuning": {"num_virtual_tokens": ["20"]},
    "p_tuning": {"num_virtual_tokens": ["20"], "encoder_hidden_size": ["128"]},
    "prefix_tuning": {"num_virtual_tokens": ["20"]},
}

# As published, one run each, batch size 8. Rank, targets and prompt lengths follow from the published numbers of trained
# parameters: LoRA 2 x 72 attentions x 8 x (1024 + 1024); prompts 2 x 20 x 1024; prefixes 20 x 24 x 2 x 1024.
PUBLISHED = {
    "lora": {"trainable": 2_359_296, "accuracy": 0.9647},
    "prompt_tuning": {"trainable": 40_960, "accuracy": 0.8724},
    "p_tuning": {"trainable": 320_768, "accuracy": 0.6059},
    "prefix_tuning": {"trainable": 983_040, "accuracy": 0.9603},
    "ia3": {"trainable": 282_624, "accuracy": 0.9647},
}
THEIRS = {"model": "bigscience/mt0-large", "per_device_train_batch_size": 8, "lora_r": 8, "lora_target_modules": "q v"}
SOURCE = "a write-up's single runs, scored on a split of its own drawing"


@exits_cleanly
def main() -> int:
    flags = [token.split("=")[0] for token in sys.argv[1:]]
    if not {"--dataset_name", "--show", "--help", "-h"} & set(flags):
        raise UserError(
            "--dataset_name is missing: give the data set's file Sentences_AllAgree.txt (see the docstring of this script)"
        )
    code, folder = redo("financial_phrasebank", METHODS, SETTINGS, sys.argv[1:])
    beside(folder, PUBLISHED, THEIRS, SOURCE)
    return code


if __name__ == "__main__":
    main()
