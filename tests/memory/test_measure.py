"""Measured ledgers of real Trainer runs on the CPU, where every byte can be derived."""

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, get_peft_model
from tiny_models import rows, tiny_model
from transformers import Trainer, TrainingArguments

from toolkit.memory.cuda import meter
from toolkit.memory.ledger import CATEGORIES
from toolkit.memory.measure import MemoryCallback


def train(model, tmp_path, name="llama", steps=3, measure=None, **arguments):
    measure = measure or MemoryCallback()
    arguments = {"per_device_train_batch_size": 2, "max_steps": steps, "optim": "adamw_torch"} | arguments
    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **arguments)
    Trainer(model, args, train_dataset=rows(name, 64), callbacks=[measure]).train()
    return measure


def at_step(measure):
    """The categories at the peak of the optimizer step, in the steady step."""
    return measure.ledger.phases["optimizer_step"].categories


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2", "qwen2"])
def test_full_finetuning_keeps_four_copies_of_the_weights(name, tmp_path):
    model = tiny_model(name)
    nbytes = 4 * sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    found = at_step(train(model, tmp_path, name))
    assert found["parameters_trainable"] == found["gradients"] == nbytes
    assert found["parameters_frozen"] == 0
    assert found["optimizer_state"] == 2 * nbytes + 4 * tensors  # exp_avg, exp_avg_sq and a float32 step each


def test_lora_keeps_gradients_and_optimizer_state_only_for_its_adapters(tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    nbytes = 4 * sum(p.numel() for p in trainable)
    assert nbytes == 4 * 2 * (4 * (64 + 64) + 4 * (64 + 32))  # 2 layers, rank 4, q: 64 -> 64, v: 64 -> 32
    measure = train(model, tmp_path)
    found = at_step(measure)
    assert found["parameters_frozen"] == frozen
    assert found["parameters_trainable"] == found["gradients"] == nbytes
    assert found["optimizer_state"] == 2 * nbytes + 4 * len(trainable)
    assert measure.ledger.parameters == {"trainable": nbytes // 4, "all": (nbytes + frozen) // 4}


def test_only_steps_after_the_first_have_optimizer_state_in_the_forward_pass(tmp_path):
    ledger = train(tiny_model("llama"), tmp_path).ledger
    assert ledger.first_step["forward"].categories["optimizer_state"] == 0
    assert ledger.phases["forward"].categories["optimizer_state"] > 0
    assert ledger.first_step["forward"].categories["gradients"] == 0


def test_skipped_steps_are_not_part_of_the_ledger(tmp_path, monkeypatch):
    """Gradients in fp16 overflow in the first steps. That needs a GPU, so here the optimizer simulates it."""
    without = train(tiny_model("llama"), tmp_path)
    step, calls = AcceleratedOptimizer.step, []

    def sometimes(self, closure=None):
        calls.append(None)
        self._is_overflow = len(calls) <= 2
        if not self._is_overflow:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", sometimes)
    skipping = train(tiny_model("llama"), tmp_path, steps=6)
    assert len(calls) == 6
    for name in ("first_step", "phases"):
        for phase, use in getattr(without.ledger, name).items():
            found = getattr(skipping.ledger, name)[phase]
            # losses of the skipped steps
            assert found.allocated_peak_bytes == pytest.approx(use.allocated_peak_bytes, abs=64)
            assert found.categories["optimizer_state"] == use.categories["optimizer_state"], (name, phase)
    assert len(skipping.batches) == len(without.batches) == 2
    assert {step for _, step, *_ in skipping.ledger.timeline} == {0, 1, 2}


def test_activation_checkpointing_reduces_only_activations(tmp_path):
    plain = train(tiny_model("llama"), tmp_path).ledger.phases["forward"].categories
    checkpointed = (
        train(
            tiny_model("llama"),
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        .ledger.phases["forward"]
        .categories
    )
    assert checkpointed["activations_saved"] < plain["activations_saved"] / 2
    states = ("parameters_trainable", "buffers", "gradients", "optimizer_state", "activations_logits_loss", "inputs")
    assert {c: checkpointed[c] for c in states} == {c: plain[c] for c in states}


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_are_activations_in_the_backward_pass(reentrant, tmp_path):
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    ledger = train(tiny_model("llama"), tmp_path, **arguments).ledger
    kept = ledger.phases["forward"].cells["activations_saved"]
    recomputed = ledger.phases["backward"].cells["activations_saved"]
    assert not any("mlp" in module for module in kept)
    assert any("mlp" in module for module in recomputed)


def test_gradient_accumulation_keeps_the_gradients_during_the_next_forward_pass(tmp_path):
    ledger = train(tiny_model("llama"), tmp_path, gradient_accumulation_steps=2).ledger
    assert (
        ledger.phases["forward"].categories["gradients"] == ledger.phases["forward"].categories["parameters_trainable"]
    )


def test_logits_and_loss_are_a_category_of_their_own(tmp_path):
    ledger = train(tiny_model("llama"), tmp_path).ledger
    # 2 rows x 32 tokens x 256 ids: at least the log-probabilities in float32
    assert ledger.phases["forward"].categories["activations_logits_loss"] >= 4 * 2 * 32 * 256


def test_the_parts_add_up_and_modules_are_named(tmp_path):
    ledger = train(tiny_model("llama"), tmp_path).ledger
    assert sum(ledger.categories_at_peak.values()) == ledger.reserved_bytes
    assert set(ledger.categories_at_peak) == set(CATEGORIES)
    modules = ledger.phases["forward"].cells["activations_saved"]
    assert "model.layers.*.mlp" in modules
    assert sum(modules.values()) > 10 * modules.get("", 0)


def test_other_steps_are_not_traced(tmp_path):
    ledger = train(tiny_model("llama"), tmp_path, steps=4, measure=MemoryCallback(steps=(2,))).ledger
    assert {step for _, step, _, _ in ledger.timeline} == {0, 2}


def test_a_run_of_one_step_has_a_ledger_too(tmp_path):
    ledger = train(tiny_model("llama"), tmp_path, steps=1).ledger
    assert ledger.phases == {"load": ledger.phases["load"]} | ledger.first_step


def test_the_peak_of_loading_leaves_out_what_is_excluded_from_it(monkeypatch):
    """PyTorch's counters are replaced, because there is no GPU here."""
    peak = {"now": 100}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update(now=60))
    gpu = torch.device("cuda:0")
    with meter.excluded_from_peak(gpu):
        peak["now"] = 900
    counter = meter.CudaMeter(gpu)
    assert [counter.take_peak(), counter.take_peak()] == [100, 60]
