"""Optimizers of packages: stand-ins with the packages' state and temporaries; compared with the packages where they are installed."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from test_cuda import Log, on
from tiny_models import save_with_tokenizer, tiny_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from toolkit.config import parse_config
from toolkit.errors import UserError
from toolkit.memory.cuda.cards import find_card
from toolkit.memory.cuda.device import Cuda
from toolkit.memory.measure import MemoryCallback
from toolkit.memory.shadow import optimizers
from toolkit.memory.shadow.fake import fake_like
from toolkit.memory.shadow.step import CPU
from toolkit.memory.trace import Trace
from toolkit.methods.full import Full
from toolkit.models import catalogue
from toolkit.models.meta import model_on_meta
from toolkit.runs.prediction import predict_run
from toolkit.runs.preflight import prepare

ADA = find_card("4090")
SHAPES = [(50,), (96, 64), (64, 96), (128, 128)]


def events(kind, group, dtype, is_fake, steps=3):
    """(sign, bytes) of all blocks but the smallest in `steps` steps, with weights of `SHAPES`; all but the first are in `group`."""
    mode, log = FakeTensorMode(allow_non_fake_inputs=True), Log()

    def made(shape):
        meta = torch.empty(shape, dtype=dtype, device="meta")
        return fake_like(mode, meta) if is_fake else torch.rand(shape, dtype=dtype)

    weights = [nn.Parameter(made(shape)) for shape in SHAPES]
    optimizer = kind([{"params": weights[:1]}, {"params": weights[1:], **group}])
    trace = Trace(log)
    for weight in weights:
        trace.adopt(weight, "parameters_trainable")
    for _ in range(steps):
        for weight, shape in zip(weights, SHAPES, strict=True):
            weight.grad = None
            weight.grad = made(shape)
            trace.adopt(weight.grad, "gradients")
        with trace:
            optimizer.step()
    trace.close()
    return [(sign, nbytes) for sign, nbytes, _ in log.events if nbytes > 300]


GALORE = {"rank": 48, "update_proj_gap": 2, "scale": 0.25}
APOLLO = {"rank": 48, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std"}
GROUPS = [
    *(
        ("galore_torch", "GaLoreAdamW", GALORE | {"proj_type": kind})
        for kind in ("std", "reverse_std", "left", "right", "full")
    ),
    ("galore_torch", "GaLoreAdamW8bit", GALORE | {"proj_type": "std"}),
    *(
        ("apollo_torch", "APOLLOAdamW", APOLLO | {"proj": proj, "scale_type": scale})
        for proj in ("random", "svd")
        for scale in ("channel", "tensor")
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("package", "name", "group"), GROUPS, ids=lambda one: one if isinstance(one, str) else None)
def test_a_step_allocates_what_the_package_allocates(package, name, group, dtype, monkeypatch):
    warnings.simplefilter("ignore")
    real = getattr(pytest.importorskip(package), name)
    monkeypatch.setattr("torch.cuda.synchronize", lambda *_: None)  # which GaLore calls on every device
    ours = optimizers.galore_8bit() if name == "GaLoreAdamW8bit" else getattr(optimizers, name)
    assert events(ours, group, dtype, is_fake=True) == events(real, group, dtype, is_fake=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "block_size"), [("AdamW8bit", 256), ("AdamW4bit", 256), ("AdamW4bit", 128)])
def test_the_quantized_state_has_torchaos_shapes(name, block_size, dtype):
    real = getattr(pytest.importorskip("torchao.optim"), name)
    weights = [nn.Parameter(torch.rand(shape, dtype=dtype)) for shape in [(50,), (100, 41), (128, 96), (64, 96)]]
    theirs, ours = (kind(weights, block_size=block_size) for kind in (real, getattr(optimizers, name)))
    for weight in weights:
        state = theirs._new_buffer(weight, True)
        parts = [state.codes, state.scale, state.qmap] if hasattr(state, "codes") else [state]
        made = ours.zeros(weight)
        assert [(t.shape, t.dtype) for t in parts] == [
            (t.shape, t.dtype) for t in (made if isinstance(made, list) else [made])
        ]


def test_low_bit_states_save_what_torchao_published():
    """torchao/optim/README.md: Llama-2-7B in bf16 took 51.6 GiB on an A100 with PyTorch's AdamW, 39.1 and 33.2 with torchao's."""
    config = catalogue.config_of("meta-llama/Llama-2-7b-hf")
    weights = list(model_on_meta(AutoModelForCausalLM, config, torch.bfloat16).parameters())

    def saved(kind, block_size):
        optimizer = kind(weights, block_size=block_size)
        state = sum(part.nbytes for weight in weights for part in optimizer.zeros(weight))
        return 2 * (sum(weight.nbytes for weight in weights) - state) / 2**30

    assert saved(optimizers.AdamW8bit, 256) == pytest.approx(51.6 - 39.1, abs=0.2)
    assert saved(optimizers.AdamW4bit, 128) == pytest.approx(51.6 - 33.2, abs=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    return str(save_with_tokenizer(config, tmp_path_factory.mktemp("llama")))


def predicted(folder, *flags, method=Full, card=ADA):
    argv = ["--model_name_or_path", folder, "--per_device_train_batch_size", "1", "--max_length", "16", *flags]
    return predict_run(parse_config(method, argv, card), CPU if card is None else Cuda(card))


def state_of(ledger):
    return ledger.phases["forward"].categories["optimizer_state"]


@pytest.mark.parametrize("card", [None, ADA])
@pytest.mark.parametrize(
    ("flags", "share"),
    [
        (("adamw_torch_8bit",), 0.26),  # of Adam's two float32 numbers for each weight: 1 byte of 4, and the scales
        (("adamw_torch_4bit",), 0.14),
        (("galore_adamw", "--optim_target_modules", "all-linear", "--optim_args", "rank=16"), 0.45),
        (("galore_adamw_8bit", "--optim_target_modules", "all-linear", "--optim_args", "rank=16"), 0.35),
        (("apollo_adamw", "--optim_target_modules", "all-linear", "--optim_args", "rank=16"), 0.3),
        (("galore_adamw_layerwise", "--optim_target_modules", "all-linear", "--optim_args", "rank=16"), 0.45),
        (("apollo_adamw_layerwise", "--optim_target_modules", "all-linear", "--optim_args", "rank=16"), 0.3),
    ],
)
def test_a_run_is_predicted_without_the_package(flags, share, card, folder):
    ledger = predicted(folder, "--optim", *flags, card=card)
    assert state_of(ledger) < share * state_of(predicted(folder, "--optim", "adamw_torch", card=card))


def test_only_the_named_modules_are_projected(folder):
    flags = ("--optim", "apollo_adamw", "--optim_args", "rank=16", "--optim_target_modules")
    few, all_linear = (state_of(predicted(folder, *flags, which)) for which in (".*q_proj", "all-linear"))
    assert all_linear < few


def test_a_higher_rank_needs_more(folder):
    flags = (
        "--optim",
        "galore_adamw",
        "--optim_target_modules",
        "all-linear",
        "--bf16",
        "--dtype",
        "bfloat16",
        "--optim_args",
    )
    assert state_of(predicted(folder, *flags, "rank=16")) < state_of(predicted(folder, *flags, "rank=64"))


def test_layerwise_optimizers_hold_one_gradient_at_a_time(folder):
    flags = ("--optim_target_modules", "all-linear", "--optim")
    plain, by_layer = (predicted(folder, *flags, name) for name in ("apollo_adamw", "apollo_adamw_layerwise"))
    grads = [one.phases["optimizer_step"].categories.get("gradients", 0) for one in (plain, by_layer)]
    assert grads[1] == 0 < grads[0]


def test_the_copy_that_cusolver_overwrites_is_counted():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    matrix = fake_like(mode, torch.empty(64, 32, device="meta"))
    taken = [
        nbytes
        for sign, nbytes, _ in on(ADA, lambda: torch.linalg.svd(matrix, full_matrices=False), matrix)
        if sign == "+"
    ]
    assert sorted(taken) == sorted([64 * 32 * 4, 32 * 4, 32 * 32 * 4, 64 * 32 * 4])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("galore_adamw",), "--optim galore_adamw needs --optim_target_modules"),
        (("galore_adafactor", "--optim_target_modules", "all-linear"), "--optim galore_adafactor is not predicted"),
        (("apollo_adamw", "--optim_target_modules", "nothing"), "No target modules found"),
    ],
)
def test_what_cannot_be_predicted_is_refused(flags, says, folder):
    with pytest.raises(UserError, match=says):
        predicted(folder, "--optim", *flags)


def test_a_prediction_says_what_it_does_not_know(folder):
    assert any(
        "the optimizer's step is compiled" in note for note in predicted(folder, "--optim", "adamw_torch_4bit").notes
    )
    galore = predicted(folder, "--optim", "galore_adamw", "--optim_target_modules", ".*q_proj")
    assert any("cuSOLVER" in note for note in galore.notes)


@pytest.mark.parametrize("optim", ["adamw_torch_4bit", "adamw_torch_8bit"])
def test_a_compiled_step_is_not_measured(optim):
    callback = MemoryCallback()
    callback.on_train_begin(SimpleNamespace(torch_compile=False, optim=optim), None, None)
    assert f"under --optim {optim}" in callback.problem


@pytest.mark.parametrize(
    ("optim", "package"),
    [("adamw_torch_4bit", "torchao"), ("galore_adamw", "galore_torch"), ("apollo_adamw", "apollo_torch")],
)
def test_a_run_without_the_package_is_refused_before_a_model_is_loaded(optim, package, folder, monkeypatch):
    monkeypatch.setattr(f"transformers.trainer_optimizer.is_{package}_available", lambda *_: False)
    monkeypatch.setattr("toolkit.runs.preflight.load_model", lambda *_: pytest.fail("a model was loaded"))
    argv = ["--model_name_or_path", folder, "--optim", optim]
    argv += ["--optim_target_modules", "q_proj"] if package != "torchao" else []
    with pytest.raises(UserError, match=f"--optim {optim}: You need to .*{package}"):
        prepare(parse_config(Full, argv))
