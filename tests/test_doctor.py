"""`footprint doctor`: simulated machines, each with one thing that matters to a run, and this one as it is."""

import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.commands.config import config_args
from bitsandbytes import cextension
from conftest import ROOT

from toolkit.cli import main
from toolkit.runs import doctor, machine
from toolkit.runs.doctor import Finding, Verdict, diagnose
from toolkit.runs.machine import Gpu, PyTorch
from toolkit.units import GIB, MIB

RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 24_243 * MIB, 23_800 * MIB, "GPU-1")
T4 = Gpu("Tesla T4", (7, 5), 40, 15_095 * MIB, 14_900 * MIB, "GPU-2")
KERNELS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_120")
Mount = namedtuple("Mount", "mountpoint fstype")


def with_cards(*gpus: Gpu, **more: object) -> PyTorch:
    return PyTorch("2.13.0", "13.0", architectures=KERNELS, gpus=gpus, **more)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a program `nvidia-smi` on the path: it prints the given text for the first argument that begins with the key."""

    def put(**texts: str) -> None:
        for key, text in texts.items():
            (tmp_path / key).write_text(text)
        (tmp_path / "nvidia-smi").write_text(
            f'#!/bin/sh\nkey=$(echo "$1" | sed "s/--query-//; s/^-*//; s/[=,].*/ &/; s/-/_/g")\nset -- $key\n'
            f'[ -f "{tmp_path}/$1" ] && cat "{tmp_path}/$1"\n'
        )
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


@pytest.fixture
def found(monkeypatch):
    """The findings that are not ok, by what was looked at, on a machine whose PyTorch and driver are as given."""
    monkeypatch.setattr(config_args, "default_config_file", "/none")
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)

    def look(seen: PyTorch, cards: list[str] | None = None, driver: str | None = "580.65", launch: str | None = None):
        monkeypatch.setattr(machine, "pytorch", lambda: seen)
        monkeypatch.setattr(machine, "driver_cards", lambda: [g.name for g in seen.gpus] if cards is None else cards)
        monkeypatch.setattr(machine, "driver_version", lambda: driver)
        monkeypatch.setattr(cextension, "lib", SimpleNamespace(compiled_with_cuda=bool(seen.gpus)))
        monkeypatch.setattr(doctor, "_not_compiled", lambda seen: {})
        return {one.what: one for one in diagnose(launch) if one.verdict is not Verdict.OK}

    return look


def test_a_machine_with_a_free_card_needs_nothing(found):
    assert found(with_cards(RTX_3090)) == {}


@pytest.mark.parametrize(
    ("gpu", "can"),
    [
        (T4, "7.5 (Turing): no bf16 and no flash attention, so recipes compute in fp32"),
        (RTX_3090, "8.6 (Ampere): bf16, flash attention, no fp8"),
        (Gpu("NVIDIA L4", (8, 9), 58, 22 * GIB, 22 * GIB), "8.9 (Ada): bf16, flash attention, fp8"),
    ],
)
def test_it_says_what_follows_from_the_compute_capability(gpu, can):
    (finding,) = doctor._gpu(0, gpu, with_cards(gpu))
    assert can in finding.value and finding.verdict is Verdict.OK


def test_who_holds_the_rest_of_a_card_is_named(found, smi):
    smi(
        compute_apps=f"GPU-1, {os.getpid()}, this one, 1\nGPU-1, 4242, /usr/bin/python3, 9000\nGPU-1, 17, /opt/a, b/game, 800\nGPU-9, 5, other, 10\n"
    )
    gpu = replace(RTX_3090, free_bytes=14_000 * MIB)
    finding = found(with_cards(gpu))["GPU 0"]
    assert finding.verdict is Verdict.ADVICE and finding.command == "ps -fp 4242,17"
    assert "other programs hold 9.7" in finding.advice
    assert "python3 (process 4242, 8.79 GiB), game (process 17, 800.0 MiB)" in finding.advice


def test_memory_that_nobody_seems_to_hold_is_said_to_be_unknown(found, smi):
    smi(compute_apps="")
    gpu = replace(RTX_3090, free_bytes=14_000 * MIB)
    assert "which ones the driver does not tell from here" in found(with_cards(gpu))["GPU 0"].advice


@pytest.mark.parametrize(
    ("seen", "cards", "driver", "env", "verdict", "says", "command"),
    [
        (
            PyTorch("2.13.0+cpu", None),
            ["NVIDIA L4"],
            "580.65",
            {},
            "problem",
            "cannot use the NVIDIA L4",
            "pip install --force-reinstall torch==2.13.0",
        ),
        (
            with_cards(error="The NVIDIA driver on your system is too old (found version 11040)."),
            ["NVIDIA L4"],
            "470.1",
            {},
            "problem",
            "too old (found version 11040).); the driver 470.1 must know CUDA 13.0",
            "nvidia-smi | grep CUDA",
        ),
        (
            with_cards(error="No CUDA GPUs are available"),
            ["NVIDIA L4"],
            "580.65",
            {"CUDA_VISIBLE_DEVICES": "7"},
            "problem",
            "CUDA_VISIBLE_DEVICES=7 names none of this machine's cards: NVIDIA L4",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (PyTorch("2.13.0+cpu", None), [], None, {}, "advice", "train on the CPU", "footprint predict lora --gpu"),
        (with_cards(error="Found no NVIDIA driver"), [], None, {}, "advice", "train on the CPU", "footprint predict"),
        (PyTorch("2.13.0", None, "ROCm"), [], None, {}, "advice", "CUDA's allocator alone", "footprint gpus"),
    ],
    ids=["CPU build", "old driver", "hidden card", "no card", "no driver", "ROCm"],
)
def test_why_no_gpu_can_be_used(seen, cards, driver, env, verdict, says, command, found, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    finding = found(seen, cards, driver)["GPU"]
    assert finding.verdict == verdict and says in finding.advice and finding.command.startswith(command)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 9), ("sm_80", "sm_86"), True),  # of the same generation, and earlier
        ((8, 0), ("sm_86",), False),
        ((6, 0), ("sm_75", "sm_80"), False),
        ((12, 0), ("sm_80", "sm_90"), False),
        ((12, 0), ("sm_80", "compute_90"), True),  # PTX is compiled for later cards
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("sm_100",), True),
    ],
)
def test_a_build_without_kernels_for_the_card_is_a_problem(capability, architectures, runs):
    gpu = Gpu("Some Card", capability, 20, 8 * GIB, 8 * GIB)
    (finding,) = doctor._gpu(0, gpu, PyTorch("2.13.0", "13.0", architectures=architectures, gpus=(gpu,)))
    assert (finding.verdict is Verdict.OK) is runs
    assert runs or "this PyTorch has kernels for" in finding.advice


def test_a_card_that_another_process_has_for_itself_is_a_problem(found):
    gpu = replace(RTX_3090, free_bytes=None, error="CUDA-capable device(s) is/are busy")
    finding = found(with_cards(gpu, T4))["GPU 0"]
    assert finding.verdict is Verdict.PROBLEM and "is/are busy" in finding.advice


def test_cards_that_differ_are_counted_in_two_ways(found, monkeypatch):
    assert found(with_cards(RTX_3090, T4))["order of GPUs"].command == "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert "order of GPUs" not in found(with_cards(RTX_3090, T4))


def test_of_several_mig_slices_a_process_must_name_its_own(found, smi, monkeypatch):
    listed = "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5)\n" + "".join(
        f"  MIG 3g.20gb     Device  {number}: (UUID: MIG-{number}{number})\n" for number in range(2)
    )
    smi(L=listed)
    part = Gpu("NVIDIA A100-SXM4-40GB MIG 3g.20gb", (8, 0), 42, 19 * GIB, 19 * GIB)
    finding = found(with_cards(part))["MIG"]
    assert finding.value == "2 slices" and finding.command == "export CUDA_VISIBLE_DEVICES=MIG-00"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-11")
    assert "MIG" not in found(with_cards(part))


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", None),
        ("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync", "advice"),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "problem"),
    ],
)
def test_settings_of_the_allocator_that_spoil_predictions_are_named(name, value, verdict, found, monkeypatch):
    monkeypatch.setenv(name, value)
    finding = found(with_cards(RTX_3090)).get("allocator")
    assert (finding and str(finding.verdict)) == verdict
    assert finding is None or finding.command == f"unset {name}"


def test_bitsandbytes_without_cuda_kernels_is_a_problem_only_beside_a_card(monkeypatch):
    monkeypatch.setattr(cextension, "lib", SimpleNamespace(compiled_with_cuda=False))
    (beside,), (alone,) = doctor._bitsandbytes(with_cards(T4)), doctor._bitsandbytes(PyTorch("2.13.0+cpu", None))
    assert beside.verdict is Verdict.PROBLEM and beside.command == "python -m bitsandbytes"
    assert alone.verdict is Verdict.OK


def test_a_library_that_others_do_not_admit_is_a_problem(monkeypatch):
    needs = {"footprint": ["peft>=0.21,<0.22", "absent>=1"], "torchvision": ["torch==2.12.0", "x; extra == 'y'"]}
    there = {"peft": "0.20.0", "torchvision": "0.27.0", "torch": "2.13.0+cpu", "torchao": "0.15.0", "footprint": "1"}
    monkeypatch.setattr(doctor, "_requirements", lambda name: needs.get(name, []))
    monkeypatch.setattr(doctor, "version_of", there.get)
    _, *findings = doctor._versions()
    assert [(one.what, one.value, one.command) for one in findings] == [
        ("peft", "0.20.0", "pip install 'peft<0.22,>=0.21'"),
        ("absent", "not installed", "pip install 'absent>=1'"),
        ("torch", "2.13.0+cpu", "pip install torch==2.12.0"),
        ("torchao", "0.15.0", "pip install 'torchao>=0.16'"),
    ]
    assert all(one.verdict is Verdict.PROBLEM for one in findings)
    assert findings[2].advice == "torchvision 0.27.0 needs torch==2.12.0"


GROUPS = {
    "version 2": ("0::/slice/job", "slice/job", ("memory.max", "memory.current", "inactive_file")),
    "version 1": (
        "4:memory:/job",
        "memory/job",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
    "as a container sees it": ("0::/not/here", "", ("memory.max", "memory.current", "inactive_file")),
}


@pytest.mark.parametrize("case", GROUPS)
def test_host_memory_respects_the_limits_of_a_container(case, tmp_path, monkeypatch):
    line, folder, (limit, used, cached) = GROUPS[case]
    (tmp_path / "own").write_text(f"1:name=systemd:/\n{line}\n")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    (group / limit).write_text(f"{256 * MIB}\n")
    (group / used).write_text(f"{200 * MIB}\n")
    (group / "memory.stat").write_text(f"anon 1\n{cached} {50 * MIB}\n")
    memory = machine.host_memory()
    assert (memory.total_bytes, memory.available_bytes, memory.limited) == (256 * MIB, 106 * MIB, True)
    (group / limit).write_text("max\n" if "max" in limit else f"{2**63 - 4096}\n")
    assert machine.host_memory().total_bytes == psutil.virtual_memory().total


def test_a_temporary_folder_in_host_memory_and_a_full_disk_are_named(tmp_path, monkeypatch, found):
    monkeypatch.setattr(
        machine.psutil, "disk_partitions", lambda all: [Mount("/", "ext4"), Mount(str(tmp_path), "tmpfs")]
    )
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=300 * MIB))
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))
    findings = found(with_cards(RTX_3090))
    assert findings["temporary files"].value == f"300.0 MiB free in {tmp_path}, which is host memory"
    assert findings["temporary files"].command == "export TMPDIR=/a/larger/disk"
    assert findings["hub cache"].command == "export HF_HOME=/a/larger/disk"
    assert findings["shared memory"].command.startswith("docker run --shm-size")


def test_a_lock_that_a_killed_build_left_is_a_problem(tmp_path, monkeypatch, found):
    lock = tmp_path / "py311_cu130" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 600,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    finding = found(with_cards(RTX_3090))["DeepSpeed"]
    assert finding.verdict is Verdict.PROBLEM and finding.command == f"rm {lock}"


@pytest.mark.parametrize(
    ("lacks", "why", "command"),
    [
        ("compiler", "there is no C++ compiler", "apt install g++"),
        ("toolkit", "CUDA_HOME does not exist", "apt install cuda-toolkit-13-0"),
        ("13.0", "Installed CUDA version 12.4 does not match the version torch was compiled with 13.0", "apt install"),
    ],
)
def test_why_deepspeed_cannot_compile_its_extensions(lacks, why, command, tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None if lacks == "toolkit" else str(tmp_path))
    monkeypatch.setenv("CXX", "/no/compiler" if lacks == "compiler" else sys.executable)
    missing = doctor._not_compiled(with_cards(T4))
    assert missing.keys() == {"cpu_adam", "async_io"}
    for reason, mends in missing.values():
        assert reason.startswith(why) and mends.startswith(command)


@pytest.mark.parametrize(
    ("launch", "gpus", "what", "says", "command"),
    [
        ("ddp", [RTX_3090], "processes", "there is 1", "--num_processes 1 ..."),
        ("bf16", [RTX_3090, T4], "precision", "the Tesla T4 has no bf16", "--mixed_precision no ..."),
        ("broken", [RTX_3090] * 2, "launch file", "distributed_type SOME is not predicted", "cat "),
    ],
)
def test_a_launch_file_that_this_machine_cannot_run_is_a_problem(launch, gpus, what, says, command, tmp_path, found):
    text = (ROOT / "launch" / "ddp.yaml").read_text()
    if launch == "bf16":
        text = text.replace('mixed_precision: "no"', "mixed_precision: bf16")
    if launch == "broken":
        text = text.replace("MULTI_GPU", "SOME")
    (tmp_path / "my.yaml").write_text(text)
    finding = found(with_cards(*gpus), launch=str(tmp_path / "my.yaml"))[what]
    assert finding.verdict is Verdict.PROBLEM and says in finding.advice and command in finding.command


def test_a_launch_file_that_asks_for_fp8_is_a_problem_on_every_card():
    (finding,) = doctor._launched_precision(
        Path("my.yaml"), {"ACCELERATE_MIXED_PRECISION": "fp8"}, with_cards(RTX_3090)
    )
    assert finding.verdict is Verdict.PROBLEM and "no recipe computes in fp8" in finding.advice


def test_offloading_is_checked_against_host_memory_disk_and_compilers(tmp_path, monkeypatch, found):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "host_memory", lambda: machine.HostMemory(64 * GIB, 32 * 10**9, False))
    seen = with_cards(RTX_3090, RTX_3090)
    assert found(seen, launch="zero2_offload") == {}
    values = [one.value for one in diagnose("zero2_offload") if one.what == "offload"]
    assert values == ["29.80 GiB of host memory hold the state of at most 1.6 billion trained parameters"]
    missing = {"async_io": ("there is no libaio", "apt install libaio-dev")}
    monkeypatch.setattr(doctor, "_not_compiled", lambda seen: missing)
    findings = [one for one in diagnose("zero3_nvme") if one.what == "offload"]
    assert [one.verdict for one in findings] == ["problem", "ok"] and findings[0].command == "apt install libaio-dev"
    monkeypatch.setattr(machine.psutil, "disk_partitions", lambda all: [Mount("/", "tmpfs")])
    assert [one.advice for one in diagnose("zero3_nvme") if one.what == "offload"][1].startswith(
        "that is the host's memory"
    )


def test_the_launch_file_that_accelerate_uses_by_default_is_named_and_checked(tmp_path, monkeypatch, found):
    found(with_cards(RTX_3090))
    default = tmp_path / "default_config.yaml"
    default.write_text((ROOT / "launch" / "ddp.yaml").read_text())
    monkeypatch.setattr(config_args, "default_config_file", str(default))
    findings = {one.what: one for one in diagnose()}
    assert findings["launch file"].value == f"accelerate's default, {default}: DDP on 2 processes"
    assert findings["processes"].verdict is Verdict.PROBLEM


def test_a_check_that_fails_becomes_a_finding(monkeypatch, found):
    def fail():
        raise ValueError("no such sensor")

    monkeypatch.setattr(machine, "host_memory", fail)
    finding = found(with_cards(RTX_3090))["host memory"]
    assert finding.verdict is Verdict.ADVICE and "the check failed (no such sensor)" in finding.advice


def test_what_pytorch_says_of_its_cards_is_read(monkeypatch):
    card = SimpleNamespace(
        name="Tesla T4", major=7, minor=5, multi_processor_count=40, total_memory=15 * GIB, uuid="ab"
    )

    def mem_get_info(number):
        if number:
            raise RuntimeError("CUDA error: device is busy\nmore")
        return 14 * GIB, 15 * GIB

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    first, second = machine.pytorch().gpus
    assert first == Gpu("Tesla T4", (7, 5), 40, 15 * GIB, 14 * GIB, "GPU-ab")
    assert second.free_bytes is None and second.error.endswith("CUDA error: device is busy more")

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert "is too old" in machine.pytorch().error


def test_the_driver_is_asked_through_nvidia_smi_or_its_files(smi, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    assert (machine.driver_cards(), machine.driver_version()) == ([], None)
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version"
    )
    (tmp_path / "gpus" / "0").mkdir(parents=True)
    (tmp_path / "gpus" / "0" / "information").write_text("Model: \t\t NVIDIA L4\nIRQ: 1\n")
    assert (machine.driver_cards(), machine.driver_version()) == (["NVIDIA L4"], "550.54.15")
    smi(gpu="NVIDIA A10G\n")
    assert machine.driver_cards() == ["NVIDIA A10G"]


@pytest.mark.parametrize(("problems", "code"), [(0, 0), (2, 1)])
def test_the_exit_code_says_whether_there_is_a_problem(problems, code, capfd, monkeypatch):
    problem = Finding("GPU", "a \x1b[31mname", Verdict.PROBLEM, "[bold]mend it[/bold] " * 12, "do this")
    advice = Finding("disk", "small", Verdict.ADVICE, "tidy up", "rm x")
    monkeypatch.setattr(doctor, "diagnose", lambda launch: iter([advice] + [problem] * problems))
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    out = capfd.readouterr().out
    assert int(end.value.code or 0) == code
    assert "         advice  tidy up\n                 $ rm x\n" in out
    assert max(map(len, out.splitlines())) <= 60 and "\x1b" not in out
    assert (
        ("problem  [bold]mend it[/bold]" in out)
        is (f"{problems} problem{'s' if problems > 1 else ''} to mend before a run" in out)
        is bool(problems)
    )


@pytest.mark.slow
def test_it_runs_on_this_machine_and_says_something_within_seconds():
    command = [sys.executable, "-c", "import sys; from toolkit.cli import main; sys.exit(main())", "doctor"]
    env = os.environ | {"NO_COLOR": "1", "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline().startswith("      footprint  ")
        assert time.monotonic() - began < 5  # 0.2 on an idle machine
        out, err = process.communicate()
    assert process.returncode in (0, 1), err
    plain = [line for line in out.splitlines() if " $ " not in line]
    assert max(map(len, plain)) <= 80 and "versions  torch" in out and "hub cache" in out
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env, cwd=ROOT)
    result = json.loads(done.stdout)
    assert (result["problems"] > 0) is (done.returncode == 1)
    names = [entry["what"] for entry in result["findings"]]
    assert {"footprint", "versions", "host memory", "hub cache", "GPU", "bitsandbytes", "DeepSpeed", "launch file"} <= {
        *names
    }
    assert not any("the check failed" in entry["advice"] for entry in result["findings"])
