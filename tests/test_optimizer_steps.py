"""Optimizer steps in the backward pass, and in chunks of weights: the same weights, bit for bit, in less memory."""

import re
from dataclasses import replace

import pytest
import torch
import yaml
from datasets import Dataset
from memory.tiny_models import tiny_model
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from training_data import config_of, task_data
from transformers import AutoTokenizer

import toolkit
from toolkit.config import parse_config
from toolkit.config.arguments import TrainArguments
from toolkit.distributed.engine import Engine, EngineKind
from toolkit.embedded import MODEL_DIR
from toolkit.errors import UserError
from toolkit.methods.full import Full
from toolkit.runs.preflight import check_combination, check_schedule
from toolkit.tasks import TASKS
from toolkit.training.optimizer_steps import CHUNK_BYTES, StepInBackward, _chunks, step_in_chunks
from toolkit.training.trainer import FineTuner

IN_BACKWARD = {"optimizer_in_backward": True}
OPTIMIZERS = [
    *("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"),
    *("adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix", "rmsprop_bnb_8bit"),
]


@pytest.fixture
def trained(tmp_path):
    """Trains a tiny model for 4 steps of 2 rows; returns its FineTuner. Further arguments are those of training."""

    def train(name="llama", lora=False, kind=FineTuner, resume=None, **arguments):
        model = tiny_model(name)
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(3, 256, (12,), generator=generator).tolist() for _ in range(8)]
        rows = Dataset.from_list([{"input_ids": i, "attention_mask": [1] * 12, "labels": i} for i in ids])
        settings = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 1}
        settings |= {"save_strategy": "no", "max_grad_norm": 0.0, "output_dir": str(tmp_path), "use_cpu": True}
        args = TrainArguments(report_to="none", disable_tqdm=True, **settings | arguments)
        data = task_data(TASKS["text"], rows, None, AutoTokenizer.from_pretrained(MODEL_DIR))
        trainer = kind(model, config_of(args), data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def same_weights(one, other):
    others = dict(other.model.named_parameters())
    return all(torch.equal(p, others[name]) for name, p in one.model.named_parameters())


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_weights_and_gradient_norms_are_those_of_the_usual_step(trained, name, optim):
    usual, in_backward = trained(name, optim=optim), trained(name, optim=optim, **IN_BACKWARD)
    assert same_weights(usual, in_backward)
    assert logged(in_backward, "loss") == logged(usual, "loss")
    assert logged(in_backward, "grad_norm") == pytest.approx(logged(usual, "grad_norm"), rel=1e-6)
    assert not same_weights(usual, trained(name, optim=optim, max_steps=1))  # the steps do something


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": True},
        {"bf16": True},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"loss_chunk_tokens": 5, "mlp_tile_tokens": 7},
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_it_works_together_with_other_flags(trained, settings):
    assert same_weights(trained(**settings), trained(**settings, **IN_BACKWARD))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_a_resumed_run_gives_the_same_weights(trained, optim, tmp_path):
    settings = {"optim": optim, "save_strategy": "steps", "save_steps": 2, **IN_BACKWARD}
    whole = trained(**settings)
    assert same_weights(whole, trained(**settings, resume=str(tmp_path / "checkpoint-2")))


def test_one_gradient_at_a_time_is_in_memory(trained):
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    held = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            held.append(sum(p.grad is not None for p in model.parameters()))

    steps = StepInBackward()
    with steps.open(Watched(model.parameters(), lr=1e-3)):
        model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    assert held == [1] * sum(1 for _ in model.parameters())
    assert steps.gradient_norm() > 0 and steps.gradient_norm() == 0
    before = [p.clone() for p in model.parameters()]
    model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # after training, gradients are kept as usual
    optimizer.step()
    assert not all(map(torch.equal, before, model.parameters()))


def test_a_weight_whose_gradient_comes_in_parts_is_refused():
    layer = torch.nn.Linear(4, 4)
    steps = StepInBackward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    with steps.open(optimizer):
        layer(torch.ones(1, 4)).sum().backward()
        with pytest.raises(UserError, match=r"a weight of shape \(4,\) got its gradient in more than one part"):
            layer(torch.ones(1, 4)).sum().backward()
    with steps.open(optimizer):  # another run after one that failed
        layer(torch.ones(1, 4)).sum().backward()


def test_a_loss_that_is_not_finite_changes_no_weight(trained):
    class Overflows(FineTuner):
        def _step_loss(self, *args, **kwargs):
            self.seen = [p.clone() for p in self.model.parameters()]
            trainers.append(self)
            return super()._step_loss(*args, **kwargs) * float("inf")

    trainers = []
    with pytest.raises(UserError, match="the loss became inf at step 1; no checkpoint had been written yet"):
        trained(kind=Overflows, **IN_BACKWARD)
    assert all(map(torch.equal, trainers[0].seen, trainers[0].model.parameters()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gradient_accumulation_steps 2", "--gradient_accumulation_steps 2 and --optimizer_in_backward exclude each"),
        (
            "--max_grad_norm 1",
            "--max_grad_norm 1.0 and --optimizer_in_backward exclude each other.* give --max_grad_norm 0",
        ),
        ("--torch_compile", "--torch_compile and --optimizer_in_backward exclude each other"),
        ("--optim prodigy", "--optimizer_in_backward with --optim prodigy: its step is one for all weights"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        config = parse_config(Full, ["--optimizer_in_backward", "--use_cpu", *flags.split()])
        check_schedule(config.training, tiny_model("llama"))


def test_the_defaults_that_it_excludes_are_left_out(tmp_path):
    flags = ["--model_name_or_path", str(tmp_path), "--use_cpu"]
    usual, training = (parse_config(Full, [*flags, *more]).training for more in ([], ["--optimizer_in_backward"]))
    assert (usual.max_grad_norm, usual.gradient_accumulation_steps) == (1.0, 2)
    assert (training.max_grad_norm, training.gradient_accumulation_steps) == (0.0, 1)
    assert training.per_device_train_batch_size == usual.per_device_train_batch_size


def test_engines_and_fp16_are_refused():
    config = parse_config(Full, ["--optimizer_in_backward", "--use_cpu"])
    check_combination(config)
    for kind in (EngineKind.DDP, EngineKind.ZERO_2, EngineKind.FSDP2):
        with pytest.raises(UserError, match=f"--optimizer_in_backward under {kind}"):
            check_combination(replace(config, engine=Engine(2, kind)))
    config.training.fp16 = True
    with pytest.raises(UserError, match="--optimizer_in_backward in fp16: a step is skipped if any gradient overflows"):
        check_combination(config)


def test_the_settings_of_a_run_in_backward_are_read_again_and_can_be_undone(tmp_path):
    first = parse_config(Full, ["--optimizer_in_backward", "--use_cpu"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first.as_dict()))
    again = parse_config(Full, ["--config", str(tmp_path / "config.yaml")]).training
    assert again.optimizer_in_backward and again.max_grad_norm == 0
    usual = parse_config(Full, ["--config", str(tmp_path / "config.yaml"), "--optimizer_in_backward", "false"]).training
    assert not usual.optimizer_in_backward and usual.max_grad_norm == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_steps_in_chunks_give_the_same_weights(kind):
    def train(chunk_bytes):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(rows, 8)) for rows in (3, 5, 40, 1, 9)]
        groups = [{"params": weights[:3], "weight_decay": 0.1}, {"params": weights[3:], "lr": 1e-2}]
        optimizer = kind(groups, lr=1e-3, foreach=True)
        if chunk_bytes:
            step_in_chunks(optimizer, chunk_bytes)
        for _ in range(3):
            for weight in weights:
                weight.grad = weight.detach().cos()
            optimizer.step()
        assert [len(group["params"]) for group in optimizer.param_groups] == [3, 2]
        return weights

    assert all(map(torch.equal, train(None), train(256)))


def test_temporaries_of_foreach_are_those_of_one_chunk_or_of_one_larger_weight():
    ledger = toolkit.predict(
        "full", model_name_or_path="Qwen/Qwen2.5-0.5B", gpu="RTX 4090", optim="adamw_torch", max_length=64
    )
    embedding = 4 * 151_936 * 896  # bytes in fp32
    assert CHUNK_BYTES < embedding <= ledger.phases["optimizer_step"].categories["temporaries"] < 1.01 * embedding


def test_a_chunk_is_of_the_bytes_that_this_process_holds():
    with torch.device("meta"):
        weights = [torch.nn.Parameter(torch.empty(8, 8)) for _ in range(4)]  # 256 bytes each
    store = FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        sharded = [torch.nn.Parameter(DTensor.from_local(torch.empty(2, 8), mesh, [Shard(0)])) for _ in weights]
        assert [len(chunk) for chunk in _chunks(weights, 256)] == [1, 1, 1, 1]
        assert [len(chunk) for chunk in _chunks(sharded, 256)] == [4]
    finally:
        torch.distributed.destroy_process_group()


def test_advice_for_a_run_that_does_not_fit_lowers_the_rows_of_a_step(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    flags = {"model_name_or_path": tmp_path, "max_length": 64, "per_device_train_batch_size": 512}
    flags["activation_checkpointing"] = True
    ledger = toolkit.predict("full", gpu_memory="150MiB", advise=True, optimizer_in_backward=True, **flags)
    assert not ledger.fits
    rows = re.search(r"it fits with .*--per_device_train_batch_size (\d+)", ledger.warnings[-1])
    assert rows and "accumulation" not in ledger.warnings[-1], ledger.warnings
