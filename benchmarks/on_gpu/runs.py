"""Runs recipes as users do: train, kill, resume, reload, generate, merge; also under the engines.

A scenario is one item. It forks a process for each step, so that each step has its own CUDA context, as a command has.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from on_gpu import models
from on_gpu.items import Item
from on_gpu.results import slug

ROOT = Path(__file__).parents[2]
TEXT = "the quick brown fox jumps over a lazy dog"
KILLED_STEPS = 40  # of a run that is killed at its first checkpoint, after 2
UNMERGED = ("prefix_tuning", "adapter", "full")  # `footprint merge` refuses these


@dataclass(frozen=True)
class Scenario:
    """A recipe on a model. `launch` is a file of launch/, with one process; `killed`: training is killed by SIGKILL.

    `whole` scenarios also resume, generate and merge; others only train.
    """

    method: str
    model: str
    flags: tuple[str, ...] = ("--bf16",)
    launch: str | None = None
    killed: bool = False
    whole: bool = True
    seconds: float = 20.0

    @property
    def name(self) -> str:
        """Such as "runs small-llama lora bf16"."""
        words = [flag.removeprefix("--") for flag in self.flags]
        return " ".join(
            ["runs", self.model, self.method, *words, self.launch or "", "killed" if self.killed else ""]
        ).strip()

    def item(self, work: Path, rehearsed: bool) -> Item:
        """The item that runs it."""
        arguments = {"scenario": vars(self), "work": str(work), "rehearsed": rehearsed}
        return Item(self.name, "runs", "on_gpu.runs:play", arguments, self.seconds, 3.0, (f"model {self.model}",))


def scenarios(rehearsed: bool = False) -> list[Scenario]:
    """All scenarios, the most common first; in a rehearsal one of each kind."""
    llama, t5, bf16 = "small-llama", "small-t5", ("--bf16",)
    eight = ("--bf16", "--load_in_8bit")
    if rehearsed:
        return [
            Scenario("lora", llama, bf16),
            Scenario("full", t5, bf16, killed=True),
            Scenario("lora", llama, bf16, "zero2", whole=False),
        ]
    slow = Scenario("full", llama, bf16, "zero3_offload", seconds=120)  # compiles DeepSpeed's optimizer for CPUs
    return [
        *(Scenario(method, model) for method in ("lora", "qlora", "full") for model in (llama, t5)),
        Scenario("lora", llama, ("--fp16",)),
        Scenario("full", llama, ("--fp16",)),
        Scenario("full", llama, killed=True),
        Scenario("lora", t5, killed=True),
        *(Scenario("qlora", model, eight) for model in (llama, t5)),
        *(Scenario("lora", llama, bf16, launch, seconds=45) for launch in ("zero2", "fsdp2")),
        slow,
        *(Scenario(method, model) for method in ("ia3", "prefix_tuning", "adapter") for model in (llama, t5)),
        Scenario("lora", t5, bf16, "zero2", seconds=45),
        Scenario("full", t5, bf16, "fsdp2", seconds=45),
        Scenario("qlora", llama, bf16, "fsdp2_qlora", seconds=45),
        Scenario("full", llama, ("--bf16", "--optim", "paged_adamw_8bit")),
        Scenario("full", llama, ("--bf16", "--gradient_checkpointing")),
        Scenario("full", llama, ("--bf16", "false")),
    ]


def play(scenario: dict[str, Any], work: str, rehearsed: bool) -> dict[str, Any]:
    """Runs the steps one after the other, until one fails.

    Raises: RuntimeError with the output of the failed step, or with what is wrong in the run folder.
    """
    one = Scenario(**{**scenario, "flags": tuple(scenario["flags"])})
    folder = Path(work) / "runs" / slug(one.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / "run"
    argv = _flags(one, work, run, rehearsed)
    steps: dict[str, float] = {}

    def step(name: str, script: Callable[[], Any], kill_when: Callable[[], bool] | None = None) -> None:
        began = time.monotonic()
        code, said = forked(script, _environment(one) if name in ("train", "resume") else {}, kill_when)
        steps[name] = round(time.monotonic() - began, 1)
        expected = -signal.SIGKILL if kill_when else 0
        if code != expected:
            raise RuntimeError(f"{one.name}: {name} ended with {code} instead of {expected}:\n{said}")

    recipe = ROOT / "recipes" / f"{one.method}.py"
    steps_of_run = KILLED_STEPS if one.killed else 2
    argv += ["--max_steps", str(steps_of_run)]
    kill_when = (lambda: any(run.glob("checkpoint-*"))) if one.killed else None
    step("train", lambda: _script(recipe, argv), kill_when)
    if one.whole:
        # a killed run goes on to its end, and a finished one says so and stays as it is
        step("resume", lambda: _script(recipe, [*argv, "--resume_from_checkpoint", "true"]))
        step("generate", lambda: _footprint("generate", str(run), TEXT))
        if one.method not in UNMERGED:
            merged = str(folder / "merged")
            step("merge", lambda: _footprint("merge", str(run), "--output_dir", merged, "--dtype", "float32"))
    _check(run, steps_of_run)
    found: dict[str, Any] = {"steps": steps}
    for name in ("memory.json", "predicted_memory.json"):
        if (run / name).is_file():
            found[name] = json.loads((run / name).read_text(encoding="utf-8"))["peak"]
    found["says"] = ", ".join(f"{name} {seconds} s" for name, seconds in steps.items())
    return found | {"agrees": True}


def _flags(one: Scenario, work: str, run: Path, rehearsed: bool) -> list[str]:
    return [
        *("--model_name_or_path", str(models.folder_of(work, one.model)), "--dataset_name", str(Path(work) / "rows")),
        *("--max_length", "64", "--max_target_length", "8", "--max_eval_samples", "2", "--learning_rate", "1e-3"),
        *("--per_device_train_batch_size", "2", "--save_strategy", "steps", "--save_steps", "2", "--report_to", "none"),
        *("--logging_steps", "1", "--output_dir", str(run), *one.flags),
        *(("--use_cpu",) if rehearsed else ()),
    ]


def _environment(one: Scenario) -> dict[str, str]:
    """The environment variables that `accelerate launch` sets, for one process."""
    if one.launch is None:
        return {}
    from toolkit.distributed.launch_files import read_launch_file

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return read_launch_file(one.launch, 1).of_rank(0) | {"MASTER_PORT": str(port)}


def _script(path: Path, argv: Sequence[str]) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") and "--use_cpu" in argv:  # accelerate sets up FSDP only on GPUs
        from accelerate.state import AcceleratorState

        from toolkit.memory.shadow.simulated_rank import begin_as_on_gpus
        from toolkit.runs import preflight

        preflight.check_fsdp = lambda *_: None
        AcceleratorState.__init__ = begin_as_on_gpus(AcceleratorState.__init__)
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name="__main__")


def _footprint(*argv: str) -> None:
    from toolkit.cli import main

    sys.argv = ["footprint", *argv]
    main(argv)


def _check(run: Path, steps: int) -> None:
    """Raises RuntimeError if the run is not finished, has another number of steps, or a bad loss."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    if not record["finished"] or lines[-1]["step"] != steps or any(loss is None or not loss > 0 for loss in losses):
        raise RuntimeError(f"finished: {record['finished']}, last step {lines[-1]['step']} of {steps}, losses {losses}")


def forked(
    script: Callable[[], Any], env: dict[str, str], kill_when: Callable[[], bool] | None = None
) -> tuple[int, str]:
    """Runs `script` in a fork of this process; returns its exit code (-9: killed) and output.

    This process must not have initialized CUDA. The fork prints to the item's log, as this process does. `kill_when` is polled;
    once it is true, the fork is killed.
    """
    log = Path(os.environ["ITEM_LOG"])
    before = log.stat().st_size
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ |= env
            os.chdir(ROOT)
            for name in [name for name in sys.modules if name.split(".")[0] == "toolkit"]:
                del sys.modules[name]  # on import they read the rank of the importing process
            try:
                script()
                code = 0
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if kill_when is not None and kill_when():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    with log.open(encoding="utf-8", errors="replace") as stream:
        stream.seek(before)
        return os.waitstatus_to_exitcode(status), stream.read()
