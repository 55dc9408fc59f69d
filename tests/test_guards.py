"""Each guard stops a real training run with the fault that it checks for, and lets good runs pass."""

from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from memory.tiny_models import tiny_model
from peft import IA3Config, LoraConfig, PeftModelForCausalLM, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training_data import config_of, task_data
from transformers import AutoTokenizer, TrainerCallback

from toolkit.config.arguments import TrainArguments
from toolkit.distributed.checksums import checksums
from toolkit.embedded import MODEL_DIR
from toolkit.errors import UserError
from toolkit.methods import METHODS
from toolkit.tasks import TASKS
from toolkit.training.guards import FIRST_STEPS, Guards, check_generation, check_loss, check_saved
from toolkit.training.trainer import FineTuner, train

CONFIGS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2),
    "pissa": LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights="pissa"),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "p_tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.fixture
def trainer(tmp_path):
    """Makes a FineTuner of a tiny Llama on four rows, for 4 steps; further arguments are those of training."""

    def make(method="lora", kind=FineTuner, callbacks=(), **arguments):
        model = tiny_model("llama")
        model = model if method == "full" else get_peft_model(model, CONFIGS[method])
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(3, 256, (12,), generator=generator).tolist() for _ in range(4)]
        rows = Dataset.from_list([{"input_ids": i, "attention_mask": [1] * 12, "labels": i} for i in ids])
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        settings = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_strategy": "no"}
        args = TrainArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **settings | arguments
        )
        data = task_data(TASKS["text"], rows, rows, tokenizer, ids)
        return kind(model, config_of(args, METHODS["full" if method == "full" else "lora"]()), data, callbacks)

    return make


def saved_is_checked(run):
    """The guard 'saved', as `train` calls it."""
    check_saved(run.model, run.config, run.data_collator([run.data.train[0]]))


@pytest.mark.parametrize("method", ["full", *(name for name in CONFIGS if name != "pissa")])
def test_a_good_run_passes_every_guard_and_keeps_its_weights(trainer, method, tmp_path):
    good = trainer(method)
    good.train()
    before = {name: p.clone() for name, p in good.model.named_parameters()}
    good.save_model(str(tmp_path))
    saved_is_checked(good)
    check_generation(good.model, good.data, good.args)
    assert all(torch.equal(p, before[name]) for name, p in good.model.named_parameters())


def test_a_loss_that_is_not_the_cross_entropy_of_label_tokens_is_found_before_training(trainer):
    run = trainer()
    base = run.model.get_base_model()
    row = run.data_collator([run.data.train[0]])
    check_loss(run.model, row, run.args)
    own = base.loss_function
    base.loss_function = lambda logits, labels, **more: own(logits, labels, **more) + 1.0
    with pytest.raises(UserError, match=r"guard 'loss': computed in chunks, .* llama .* give --loss_chunk_tokens 0"):
        train(run)


def test_liger_leaves_the_loss_to_its_chunks(trainer, monkeypatch):
    given = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, options: given.append(options))
    trainer(use_liger_kernel=True).train()
    trainer(use_liger_kernel=True, loss_chunk_tokens=0).train()
    assert given == [{"cross_entropy": False, "fused_linear_cross_entropy": False}, None]


def test_weights_in_float32_that_compute_in_bf16_are_rounded_too(trainer, monkeypatch):
    """As full fine-tuning does on every card that has bf16; accelerate's autocast stays around the model after training."""
    monkeypatch.setattr("toolkit.training.guards.generation_error", lambda *args: 0.02)
    run = trainer("full", bf16=True)
    assert run.model.dtype == torch.float32
    check_generation(run.model, run.data, run.args)
    run.args.bf16 = False
    with pytest.raises(UserError, match=r"the logits differ by 0\.02 of their spread \(at most 0\.01\)"):
        check_generation(run.model, run.data, run.args)


def test_a_prefix_that_generation_ignores_is_found(trainer, monkeypatch):
    run = trainer("prefix")
    run.model.prompt_encoder["default"].embedding.weight.data.mul_(4)
    check_generation(run.model, run.data, run.args)
    lost = lambda self, *args, **kwargs: self.base_model_prepare_inputs_for_generation(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(PeftModelForCausalLM, "prepare_inputs_for_generation", lost)
    with pytest.raises(
        UserError,
        match=r"guard 'generation': .* the logits differ by .* transformers .* and peft .* may not be compatible",
    ):
        check_generation(run.model, run.data, run.args)


def test_a_loss_that_does_not_depend_on_the_weights_stops_the_run_by_the_third_step(trainer):
    class Detached(FineTuner):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * 0.0

    with pytest.raises(UserError, match="guard 'gradient': its norm was 0, 0, 0 in the first 3 steps"):
        trainer(kind=Detached, max_steps=100).train()


def test_a_learning_rate_that_changes_no_weight_stops_the_run(trainer):
    with pytest.raises(UserError, match="guard 'update': after 3 steps no trained weight has changed"):
        trainer("full", learning_rate=1e-30, max_steps=100).train()


def test_a_run_shorter_than_the_first_steps_is_checked_at_its_end(trainer):
    with pytest.raises(UserError, match="guard 'update': after 1 steps"):
        trainer("full", learning_rate=1e-30, max_steps=1).train()
    trainer("full", max_steps=1).train()


def test_a_warm_up_with_a_first_step_that_changes_nothing_passes(trainer):
    trainer("full", warmup_steps=3, lr_scheduler_type="linear").train()


def test_a_frozen_weight_that_changes_is_named(trainer):
    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                weight = model.get_parameter("base_model.model.model.norm.weight")
                weight.data[5] += 1e-6

    with pytest.raises(UserError, match=r"guard 'frozen': 1 of \d+ frozen .*model\.norm\.weight among them"):
        trainer(callbacks=[Meddler()]).train()


def test_an_adapter_file_that_is_empty_incomplete_or_altered_is_refused(trainer, tmp_path):
    run = trainer()
    run.train()
    run.save_model(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if "lora_B" in key)

    save_file({**weights, name: weights[name] * 1.5}, file)
    with pytest.raises(UserError, match=r"guard 'saved': the adapter loaded from .* gives logits that differ"):
        saved_is_checked(run)
    save_file({key: tensor for key, tensor in weights.items() if key != name}, file)
    with pytest.raises(UserError, match="guard 'saved': 1 trained weights are not in"):
        saved_is_checked(run)
    save_file({}, file)
    with pytest.raises(UserError, match=r"guard 'saved': .* holds no weights"):
        saved_is_checked(run)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"guard 'saved': .* cannot be read"):
        saved_is_checked(run)


def test_a_full_model_that_was_saved_with_other_weights_is_refused(trainer, tmp_path):
    run = trainer("full")
    run.save_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"guard 'saved': .*model\.norm\.weight differs"):
        saved_is_checked(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_checksum_sees_one_changed_bit_a_scaling_and_a_tail(dtype):
    for size in (1, 7, 64, 67):
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype), requires_grad=False)
        seen = {checksums(module, trainable=False)["weight"]}
        module.weight.data.view(torch.uint8)[-1] ^= 2
        seen |= set(checksums(module, trainable=False).values())
        module.weight.data = torch.zeros(size, dtype=dtype)
        seen |= set(checksums(module, trainable=False).values())
        assert len(seen) == 3 and not checksums(module, trainable=True)


def test_an_update_that_16_bits_round_away_is_only_checked_at_the_end():
    """DeepSpeed updates a copy in fp32; the model's weights are that copy, rounded."""
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    guards, nothing = Guards(), SimpleNamespace()
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-4}])
    guards.on_train_begin(nothing, nothing, nothing, model=model)
    for _ in range(FIRST_STEPS + 1):
        guards.gradient(1.0)
        guards.on_pre_optimizer_step(nothing, nothing, nothing, optimizer=optimizer)
        guards.on_step_end(nothing, nothing, nothing, model=model)
    with pytest.raises(UserError, match="guard 'update': after 3 steps no trained weight has changed"):
        guards.on_train_end(nothing, nothing, nothing, model=model)
    with torch.no_grad():
        model.bias += 1
    guards.on_train_end(nothing, nothing, nothing, model=model)


def test_only_rank_0_pushes_the_run_folder_unchanged(monkeypatch, tmp_path):
    pushed = []
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: pushed.append(options))
    args = SimpleNamespace(output_dir=str(tmp_path), hub_token=None, hub_revision=None)
    for is_main in (False, True):
        trainer = object.__new__(FineTuner)
        trainer.args, trainer.hub_model_id, trainer.push_in_progress = args, "someone/a-run", None
        trainer.is_world_process_zero = lambda is_main=is_main: is_main
        trainer.push_to_hub()
    (options,) = pushed
    assert (options["repo_id"], options["folder_path"]) == ("someone/a-run", str(tmp_path))

    def left_out(name):
        return any(fnmatch(name, pattern) for pattern in options["ignore_patterns"])

    assert all(left_out(f"{name}/x") for name in ("checkpoint-2", "abandoned-checkpoint-2", ".saving/checkpoint-3"))
    assert not left_out("adapter_model.safetensors") and not left_out("README.md")
