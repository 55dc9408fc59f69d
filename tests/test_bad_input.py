"""A user's mistake ends a recipe with exit code 2 and one line, before any model is loaded."""

import importlib.util
import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, recipe, run, write_csv
from huggingface_hub.errors import LocalTokenNotFoundError
from reliability import Run
from transformers.training_args import ParallelMode
from transformers.utils.import_utils import is_galore_torch_available, is_lomo_available

from toolkit.config import parse_config
from toolkit.distributed.engine import NO_ENGINE
from toolkit.distributed.folders import find_launch_file
from toolkit.distributed.launch_files import read_launch_file
from toolkit.errors import UserError
from toolkit.methods.lora import Lora
from toolkit.runs.preflight import check_engine, check_installed, prepare

ROWS = [("#Person1#: Hi.", "They greet.")] * 8


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Runs a recipe in this process and returns its one-line error; loading a model fails the test."""

    def refusal(*argv, name: str = "lora") -> str:
        def load_model(*args, **kwargs):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("toolkit.models.loading.load_model", load_model)
        monkeypatch.chdir(tmp_path)
        done = recipe(name, *argv)
        assert done.returncode == 2
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return refusal


@pytest.fixture
def rows(tmp_path):
    return write_csv(tmp_path / "rows", train=ROWS, validation=ROWS, test=ROWS)


def test_an_unknown_flag(refused):
    assert "did you mean lora_r?" in refused("--lora_rr", "8")


def test_a_data_folder_that_does_not_exist(refused, tmp_path):
    assert "no such folder or file" in refused("--dataset_name", tmp_path / "nowhere")


def test_a_missing_column(refused, rows):
    assert "no column 'dialog' (did you mean dialogue?)" in refused("--dataset_name", rows, "--text_column", "dialog")


def test_a_model_folder_that_does_not_exist(refused):
    assert "no such folder" in refused("--model_name_or_path", "./nowhere")


def test_a_model_folder_without_config(refused, tmp_path):
    (tmp_path / "model").mkdir()
    assert "the folder has no config.json" in refused("--model_name_or_path", tmp_path / "model")


def test_a_model_folder_without_weights(refused, tiny_t5):
    assert "no weights; add --random_weights" in refused("--model_name_or_path", tiny_t5)


def test_a_hub_model_that_cannot_be_loaded(refused):
    message = refused("--model_name_or_path", "nobody/nothing")
    assert "nobody/nothing" in message and ("hub cannot be reached" in message or "HF_HUB_OFFLINE is set" in message)


def test_an_unknown_architecture(refused, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "zebra"}))
    message = refused("--model_name_or_path", tmp_path, "--random_weights")
    assert "does not know the architecture 'zebra'" in message


def test_a_model_that_does_not_generate_text(refused, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "does not generate text" in refused("--model_name_or_path", tmp_path, "--random_weights")


def test_t5_in_fp16(refused, tiny_t5, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *a: (7, 5))
    from toolkit.models.arguments import ModelArguments
    from toolkit.models.loading import load_model_config

    with pytest.raises(UserError, match="activations exceed fp16's largest number"):
        load_model_config(ModelArguments(str(tiny_t5), random_weights=True), fp16=True)
    monkeypatch.undo()


def test_t5_with_weights_in_fp16(refused, tiny_t5):
    message = refused("--model_name_or_path", tiny_t5, "--random_weights", "--dtype", "float16")
    assert "overflows; use bfloat16 or float32" in message


def test_4_bit_on_a_model_that_is_already_quantized(refused, data, tmp_path):
    folder = tmp_path / "quantized"
    shutil.copytree(data / "models" / "stories260k", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused("--model_name_or_path", folder, "--load_in_4bit")
    assert "stored in bitsandbytes' 8 bits: recipes/qlora.py --load_in_8bit trains it" in message


def test_a_lora_target_that_matches_no_module_lists_those_that_exist(refused, data, rows):
    model = data / "models" / "stories260k"
    message = refused("--model_name_or_path", model, "--dataset_name", rows, "--lora_target_modules", "q_project")
    assert "q_project matches no module (did you mean q_proj?)" in message
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in message


def test_a_label_longer_than_the_model_can_take(refused, data, tmp_path):
    folder = write_csv(tmp_path / "long", train=[("a", "word " * 600)], validation=ROWS, test=ROWS)
    message = refused("--model_name_or_path", data / "models" / "stories260k", "--dataset_name", folder)
    assert "more than the 512 that the model can take" in message


def test_an_output_folder_that_is_not_empty(refused, rows, data, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    common = ("--model_name_or_path", data / "models" / "stories260k", "--dataset_name", rows)
    assert "is not empty" in refused(*common, "--output_dir", tmp_path / "old")


def test_an_output_folder_that_cannot_be_written(refused, rows, data, tmp_path):
    (tmp_path / "file").touch()
    common = ("--model_name_or_path", data / "models" / "stories260k", "--dataset_name", rows)
    assert "cannot be written (Not a directory)" in refused(*common, "--output_dir", tmp_path / "file" / "run")
    assert "is a file" in refused(*common, "--output_dir", tmp_path / "file")
    assert "cannot be written" in refused(*common, "--output_dir", "/proc/run")


def test_resuming_where_there_is_no_checkpoint(refused, rows, data, tmp_path):
    common = ("--model_name_or_path", data / "models" / "stories260k", "--dataset_name", rows)
    message = refused(*common, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", "true")
    assert "no checkpoint in" in message and not (tmp_path / "new").exists()


def test_the_errors_of_a_gated_and_a_missing_hub_model_say_what_to_do(monkeypatch):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from toolkit.models.arguments import ModelArguments
    from toolkit.models.loading import load_model_config

    for kind, expected in (
        (GatedRepoError, "is gated: accept its licence"),
        (RepositoryNotFoundError, "is not on the hub"),
    ):

        def fail(*args, kind=kind, **kwargs):
            raise OSError("as transformers wraps it") from kind.__new__(kind)

        monkeypatch.setattr("toolkit.models.loading.AutoConfig.from_pretrained", fail)
        monkeypatch.setattr("toolkit.models.loading.check_reachable", lambda *args: None)
        with pytest.raises(UserError, match=f"user/name {expected}"):
            load_model_config(ModelArguments("user/name"))


def test_pushing_to_a_hub_without_a_login_and_to_one_that_cannot_be_reached(refused, monkeypatch):
    assert "--push_to_hub: the hub cannot be reached (" in refused("--push_to_hub", "--hub_token", "none")  # offline

    class ConnectError(Exception):
        """Like httpx's, which is not an OSError."""

    for error, expected in (
        (ConnectError("[Errno -2] Name or service not known"), "the hub cannot be reached ([Errno -2] Name"),
        (LocalTokenNotFoundError("Token is required"), "not logged in to the hub (Token is required)"),
    ):
        monkeypatch.setattr("toolkit.runs.preflight.whoami", Mock(side_effect=error))
        assert f"--push_to_hub: {expected}" in refused("--push_to_hub")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--report_to foo", "--report_to foo is not known; there are azure_ml, "),
        (
            "--report_to comet_ml",
            "--report_to comet_ml: comet-ml is not installed; pip install comet-ml, or leave it out",
        ),
        ("--use_liger_kernel", "--use_liger_kernel: its kernels need a GPU"),
        ("--fsdp full_shard", "which accelerate only runs on GPUs, and --use_cpu was given"),
        ("--optim sgd --optim_args momentum=much", "--optim sgd --optim_args momentum=much: could not convert"),
        ("--optim adafactor --optim_args d_coef=2", "--optim_args d_coef=2 has no effect with --optim adafactor"),
        ("--optim sgd --optim_args momentun=0.9", "--optim_args momentun=0.9 has no effect with --optim sgd"),
        ("--adam_epsilon -1 --optim adamw_torch", "--adam_epsilon -1 is not possible; give a number of at least 0"),
        ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr: One of min_lr or"),
        ("--lr_scheduler_type warmup_stable_decay", "--lr_scheduler_type warmup_stable_decay: it missing 1 required"),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":2}', "unexpected keyword argument 'cycles'"),
        ('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":"a"}', "--lr_scheduler_type polynomial"),
        ('--lr_scheduler_type constant --lr_scheduler_kwargs {"power":2}', "--lr_scheduler_kwargs has no effect with"),
        ("--dataloader_drop_last --per_device_train_batch_size 9", "8 rows are fewer than a batch of 9 on each of 1"),
        (
            "--dataloader_drop_last --per_device_eval_batch_size 9 --eval_strategy epoch",
            "leaves nothing to validate: 8 rows are fewer than a batch of 9",
        ),
    ],
)
def test_flags_that_trainer_would_only_refuse_after_loading_the_model(flags, expected, refused, data, rows):
    model = data / "models" / "stories260k"
    message = refused("--model_name_or_path", model, "--dataset_name", rows, "--use_cpu", *flags.split())
    assert expected in message, message


@pytest.mark.parametrize(
    ("flags", "package", "expected"),
    [
        ("--optim galore_adamw --optim_target_modules q", "galore_torch", "You need to install `galore_torch`"),
        ("--optim lomo", "lomo_optim", "--optim lomo: You need to install `lomo_optim`"),
    ],
)
def test_a_package_that_is_not_installed(flags, package, expected, refused, monkeypatch):
    checks, find = (is_galore_torch_available, is_lomo_available), importlib.util.find_spec
    with monkeypatch.context() as hidden:  # for it may be installed here
        hidden.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else find(name, *more))
        for check in checks:
            check.cache_clear()
        message = refused("--use_cpu", *flags.split())
    for check in checks:
        check.cache_clear()
    assert expected in message


def test_liger_kernel_that_is_not_installed_on_a_machine_with_a_gpu(monkeypatch):
    # for it may be installed here
    monkeypatch.setattr("toolkit.runs.preflight.is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match="--use_liger_kernel: liger-kernel is not installed"):
        check_installed(SimpleNamespace(use_liger_kernel=True, device=torch.device("cuda")))


@pytest.mark.parametrize("flags", [[], ["--use_cpu"]])
def test_fsdp_without_gpus_is_refused_with_advice_that_does_not_depend_on_the_flag(flags, refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    message = refused(*flags)
    assert "FSDP2 on 1 process, which accelerate only runs on GPUs" in message
    assert "for a trial on CPUs use launch/zero3.yaml, with --use_cpu after the recipe's name" in message


def test_sharding_by_flag_on_one_process():
    with pytest.raises(UserError, match="--fsdp shards a model across processes, but only one runs"):
        check_installed(
            SimpleNamespace(use_liger_kernel=False, fsdp=["full_shard"], parallel_mode=ParallelMode.NOT_PARALLEL)
        )


@pytest.mark.parametrize(
    "flags",
    [
        "--optim sgd --optim_args momentum=0.9 --lr_scheduler_type reduce_lr_on_plateau --eval_strategy epoch",
        "--optim adafactor --lr_scheduler_type constant",
        "--optim paged_adamw_8bit --lr_scheduler_type inverse_sqrt",
        "--optim prodigy --optim_args d_coef=2 --lr_scheduler_type cosine_with_restarts",
        '--optim adamw_torch_fused --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.1}',
        '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":10}',
        "--lr_scheduler_type greedy --eval_strategy epoch --dataloader_drop_last --per_device_train_batch_size 8",
    ],
)
def test_optimizers_and_schedules_that_can_be_built_are_accepted(flags, data, rows):
    model = data / "models" / "stories260k"
    common = ["--model_name_or_path", str(model), "--dataset_name", str(rows), "--use_cpu"]
    assert prepare(parse_config(Lora, [*common, *flags.split()])).trainable_parameters > 0


def test_a_launch_file_is_found_from_every_folder(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--launch zero4: there is no such launch file .*; there are .*zero3"):
        read_launch_file("zero4")
    monkeypatch.chdir(tmp_path)
    assert read_launch_file("zero3", 2).engine.kind == read_launch_file("launch/zero3.yaml", 2).engine.kind == "ZeRO-3"
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "zero3.yaml", tmp_path / "launch" / "own.yaml")
    assert find_launch_file("own") == tmp_path / "launch" / "own.yaml"


def test_an_engine_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "DeepSpeed, which is not installed" in refused()


def test_a_compiler_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="--torch_compile compiles C\\+\\+ code, and there is no compiler"):
        check_engine(
            NO_ENGINE,
            SimpleNamespace(
                torch_compile=True, push_to_hub=False, deepspeed=None, fsdp=None, world_size=1, optim="sgd"
            ),
        )


@pytest.mark.slow
def test_the_process_of_a_recipe_exits_with_2_and_one_line():
    done = run("python", "recipes/full.py", "--max_steps", "0")
    assert done.returncode == 2
    assert done.stderr == "error: --max_steps 0 trains nothing; give at least 1, or leave it out to train by epochs\n"


@pytest.mark.slow
def test_only_the_first_rank_prints(tmp_path):
    ranks = Run("recipes/lora.py", "--use_cpu", "--lora_r", "0", log=tmp_path, processes=2)
    assert ranks.wait() == [2, 2], ranks.text()
    assert ranks.text().count("error: --lora_r 0 is not possible") == 1


@pytest.mark.slow
def test_the_footprint_command_exits_with_2_and_one_line(tmp_path):
    done = run("footprint", "generate", tmp_path, "text")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} is not a run folder") and done.stderr.count("\n") == 1
