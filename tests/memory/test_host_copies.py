"""Activations in host memory: predicted as they are copied, for a card and, with real copies, against a measured run."""

import json

import pytest
from ledgers import assert_same
from test_shadow import attach, empty_model, real_model, training_arguments
from tiny_models import CONFIGS, rows, save_with_tokenizer, tiny_config
from transformers import Trainer

from toolkit.config import parse_config
from toolkit.config.arguments import TrainArguments
from toolkit.distributed.launch_files import ONE_PROCESS
from toolkit.errors import UserError
from toolkit.memory.cuda.cards import find_card
from toolkit.memory.measure import MemoryCallback
from toolkit.memory.shadow.host_copies import activations_on_host
from toolkit.memory.shadow.step import predict
from toolkit.methods.lora import Lora
from toolkit.methods.qlora import QLora
from toolkit.runs.prediction import PredictionJob, predict_run

OFFLOAD = '{"offload": true}'
ROWS, LENGTH = 2, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config("llama")
    config.num_hidden_layers = 6
    return save_with_tokenizer(config, tmp_path_factory.mktemp("llama"))


def predicted(folder, *more, card="RTX 4090"):
    flags = ["--model_name_or_path", str(folder), "--bf16", "--max_length", str(LENGTH), "--max_target_length", "8"]
    flags += ["--per_device_train_batch_size", str(ROWS), "--activation_checkpointing", *more]
    return PredictionJob.of("lora", flags, ONE_PROCESS, find_card(card)).predict()


def test_the_inputs_of_layers_leave_the_card_and_take_powers_of_two_of_the_hosts_memory(folder):
    inputs = ROWS * LENGTH * 64 * 2  # bytes: one layer's, in bf16
    on_card, on_host = predicted(folder), predicted(folder, "--activation_checkpointing_kwargs", OFFLOAD)
    end = [one.phases["forward"].allocated_end_bytes for one in (on_card, on_host)]
    assert end[0] - end[1] == 5 * inputs  # the embeddings are a leaf of the graph, and stay as well
    assert (on_card.host_bytes, on_card.copied_bytes) == (0, 0)
    assert on_host.host_bytes == 6 * 16384 > 6 * inputs  # 12,288 bytes become 16,384
    assert on_host.copied_bytes == 2 * 6 * inputs


def test_some_layers_are_not_recomputed(folder):
    every = predicted(folder, "--activation_checkpointing_kwargs", '{"every_n_layers": 2, "offload": true}')
    each = predicted(folder, "--activation_checkpointing_kwargs", OFFLOAD)
    assert every.copied_bytes == each.copied_bytes / 2
    assert every.allocated_bytes > each.allocated_bytes


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_real_run_with_the_same_copies_is_predicted_to_the_byte(name, reentrant, tmp_path, monkeypatch):
    """On a CPU the copies are blocks of the same memory; both ledgers count them for the host."""
    monkeypatch.setitem(CONFIGS, name, CONFIGS[name])
    options = {"use_reentrant": reentrant, "offload": True}
    arguments = TrainArguments(
        **{
            **{
                k: v
                for k, v in vars(training_arguments(tmp_path)).items()
                if k in ("max_steps", "output_dir", "use_cpu")
            },
            "report_to": [],
            "save_strategy": "no",
            "per_device_train_batch_size": 2,
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": options,
        }
    )
    data = rows(name, 4)

    def trainer(model, arguments, callback):
        return Trainer(model, arguments, train_dataset=data, callbacks=[callback])

    expected = predict(lambda: attach(empty_model(name, None), "lora"), trainer, arguments)
    measure = MemoryCallback()
    with activations_on_host(options):
        trainer(attach(real_model(name, None, tmp_path), "lora"), arguments, measure).train()
    assert_same(expected, measure.ledger)
    assert expected.host_bytes == measure.ledger.host_bytes > 0
    assert expected.copied_bytes == measure.ledger.copied_bytes > 0


def test_without_a_gpu_it_has_no_effect(folder):
    flags = ["--model_name_or_path", str(folder), "--use_cpu", "--max_length", "64", "--activation_checkpointing"]
    config = parse_config(Lora, [*flags, "--activation_checkpointing_kwargs", OFFLOAD])
    with pytest.raises(UserError, match="offload has no effect without a GPU"):
        predict_run(config)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('{"every_n_layers": 0}', "every_n_layers 0 is not possible; give a whole number of at least 1"),
        ('{"every_n_layers": true}', "every_n_layers True is not possible"),
        ('{"every_n_layers": 1.5}', "every_n_layers 1.5 is not possible"),
        ('{"offload": "yes"}', "offload 'yes' is not possible; give true or false"),
        ('{"use_reentrant": "x"}', "use_reentrant 'x' is not possible; give true or false"),
        ('{"determinism_check": "foo"}', "determinism_check 'foo' is not possible; give default or none"),
        ('{"use_reentrant": true, "debug": true}', "debug and determinism_check need use_reentrant false"),
        ('{"offloads": true}', "has no 'offloads'; give some of .*every_n_layers.*offload"),
    ],
)
@pytest.mark.parametrize("name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
def test_impossible_values_are_refused(value, said, name):
    with pytest.raises(UserError, match=said):
        parse_config(Lora, ["--activation_checkpointing", f"--{name}", value])


def test_options_without_checkpointing_have_no_effect():
    with pytest.raises(UserError, match="has no effect without --activation_checkpointing"):
        parse_config(Lora, ["--activation_checkpointing_kwargs", OFFLOAD])


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_both_names_of_checkpointing_are_the_same_flag(name, tmp_path):
    model = ["--model_name_or_path", str(tmp_path)]
    chosen = parse_config(Lora, [f"--{name}", *model])
    assert chosen.training.activation_checkpointing and chosen.training.gradient_checkpointing
    assert chosen.as_dict()["activation_checkpointing"] and "gradient_checkpointing" not in chosen.as_dict()
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({name: True, "model_name_or_path": str(tmp_path)}))
    assert parse_config(Lora, ["--config", str(file)]).training.activation_checkpointing
    assert not parse_config(QLora, [f"--{name}", "false", *model]).training.activation_checkpointing
    for other in ("activation_checkpointing", "gradient_checkpointing"):  # the command line wins over the file
        assert not parse_config(Lora, ["--config", str(file), f"--{other}", "false"]).training.activation_checkpointing


def test_a_runs_own_file_can_be_used_without_checkpointing(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(parse_config(Lora, ["--activation_checkpointing"]).as_dict()))
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        again = parse_config(Lora, ["--config", str(file), f"--{name}", "false"])
        assert not again.training.activation_checkpointing


def test_two_values_under_both_names_are_refused():
    with pytest.raises(UserError, match="older name of --activation_checkpointing, and both are given"):
        parse_config(Lora, ["--activation_checkpointing", "--gradient_checkpointing", "false"])


def test_a_transformers_without_offloading_says_so(folder, monkeypatch):
    monkeypatch.setattr(
        "transformers.PreTrainedModel.activation_checkpointing_enable",
        lambda self, gradient_checkpointing_kwargs=None: None,
    )
    with pytest.raises(UserError, match=r"transformers .* has no 'offload'; install a newer one"):
        predicted(folder, "--activation_checkpointing_kwargs", OFFLOAD)
