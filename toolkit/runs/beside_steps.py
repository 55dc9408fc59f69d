"""What a run does with its model beside the training steps, run for a prediction: validation, scoring, and the checks of saving."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import PreTrainedModel

from toolkit.config import Config
from toolkit.distributed.sharded_models import is_sharded
from toolkit.models.generation import IGNORES_MASK, answering, classes_of, losses_of
from toolkit.models.longest_answer import generate_first_and_last
from toolkit.runs.resources import Saved
from toolkit.training.guards import end_of, largest_difference, logits_of, reloads_base
from toolkit.training.trainer import FineTuner

Batch = dict[str, torch.Tensor]


def beside_steps(
    config: Config, batch: Batch, prompt_tokens: int, new_tokens: int, on_cpu: bool, keep: Callable[[Saved], object]
) -> dict[str, Callable[[Any], object]]:
    """By phase, what the run of `config` does beside its steps, with its trainer.

    - evaluation, with --eval_strategy: `FineTuner.prediction_step` on `batch`, a collated batch of --per_device_eval_batch_size rows,
    - scoring: answers of at most `new_tokens` tokens to as many prompts of `prompt_tokens`. The run scores the base model too, before
      training: that needs less, since neither adapters nor optimizer state are there,
    - saving: writing copies nothing on the device; then an adapter is loaded into the model again and gives the logits of the end of a row, and
      the weights of a whole model are loaded on the CPU. Under ZeRO-3 and FSDP2 the weights are gathered as in a training step,
      module by module, and nothing is compared. `keep` receives what is saved.
    """
    validates = str(getattr(config.training.eval_strategy, "value", config.training.eval_strategy)) != "no"
    rows = config.training.per_device_eval_batch_size
    # copies, because a view keeps the whole batch
    evaluated, row = ({name: tensor[:n].clone() for name, tensor in batch.items()} for n in (rows, 1))
    row = {name: tensor.clone() for name, tensor in end_of(row).items()}
    texts = {
        name: one[:, :prompt_tokens].clone() for name, one in batch.items() if name in ("input_ids", "attention_mask")
    }

    def evaluation(trainer: FineTuner) -> object:
        model = trainer.model
        model.eval()
        try:
            inputs = evaluated.copy()
            evaluated.clear()  # no later phase has this batch
            return trainer.prediction_step(model, inputs, True)
        finally:
            model.train()

    def scoring(trainer: FineTuner) -> None:
        model: PreTrainedModel = trainer.model
        with answering(model), suppress(DataDependentOutputException):  # where values are read, all is allocated
            if "num_beams" in config.task.flags:
                together = 1 if model.config.model_type in IGNORES_MASK else rows
                generate_first_and_last(model, together, prompt_tokens, new_tokens, config.data.get("num_beams") or 1)
                return
            if config.task.model_kind == "head":
                classes_of(model, texts)
            else:
                losses_of(model, texts, [prompt_tokens] * rows)

    @torch.no_grad()
    def saving(trainer: FineTuner) -> None:
        model = trainer.model
        keep(Saved.of(trainer))
        if is_sharded(model):
            return
        if not isinstance(model, PeftModel):
            loaded = [torch.empty_like(p) for p in model.parameters()] if on_cpu else []
            del loaded
            return
        before = logits_of(model, row, config.training)
        again = reloads_base(model, config)
        loaded = [torch.empty_like(p) for p in model.parameters() if again or (p.requires_grad and on_cpu)]
        with suppress(DataDependentOutputException):
            largest_difference(logits_of(model, row, config.training), before)
        del loaded

    return ({"evaluation": evaluation} if validates else {}) | {"scoring": scoring, "saving": saving}
