"""The environment that `accelerate launch` would set for a launch file, for predictions; nothing is launched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit.distributed.deepspeed import read_deepspeed
from toolkit.distributed.engine import Engine
from toolkit.distributed.folders import find_launch_file, shipped
from toolkit.distributed.request import requested_engine
from toolkit.errors import UserError, guarded
from toolkit.errors.reading import check_shape, read_yaml
from toolkit.seams import patched

FOLDER = shipped("launch")
MOST_PROCESSES = 10**5


@dataclass(frozen=True)
class LaunchEnvironment:
    """A launch file as accelerate reads it, for a number of processes."""

    processes: int
    machines: int
    env: Mapping[str, str]  # variables that accelerate's launcher sets for rank 0

    def of_rank(self, rank: int) -> dict[str, str]:
        """The environment of `rank`."""
        local = self.processes // self.machines
        own = {"RANK": rank, "LOCAL_RANK": rank % local}
        return {**self.env, **{name: str(value) for name, value in own.items()}}

    @property
    def engine(self) -> Engine:
        """The engine that the file requests.

        Raises: UserError for a DeepSpeed configuration that cannot be read.
        """
        return requested_engine(env=self.env)


def read_launch_file(name: str, processes: int | None = None) -> LaunchEnvironment:
    """Reads the launch file `name`: one of launch/ (`zero3`), or a path. `processes` replaces the number in the file.

    Raises: UserError if the file does not exist or is no launch file of accelerate, and for an impossible number of processes.
    """
    path = find_launch_file(name)
    what, remedy = f"--launch {path}", "see the files of launch/ for examples"
    settings = read_yaml(path, what, remedy)
    check_shape(
        settings, {f"{name}_config?": (dict, None) for name in ("deepspeed", "fsdp", "parallelism")}, what, remedy
    )
    processes = settings.get("num_processes", 1) if processes is None else processes
    machines = settings.get("num_machines", 1)
    for what, number in (("num_processes", processes), ("num_machines", machines)):
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST_PROCESSES:
            raise UserError(
                f"--launch {path}: {what} {number!r} is not possible; give a whole number from 1 to {MOST_PROCESSES:,}"
            )
    if processes % machines:
        raise UserError(
            f"--num_processes {processes} cannot be started on {machines} machines; give a multiple of {machines}"
        )
    kind = str(settings.get("distributed_type", "NO"))
    if kind == "NO" and processes > 1:
        raise UserError(
            f"{path} starts one process, not {processes}; give another file of launch/, such as --launch ddp"
        )
    if kind == "MULTI_GPU" and processes < 2:
        raise UserError(f"{path} starts at least 2 processes; for one, leave --launch and --num_processes out")
    if kind not in ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP"):
        raise UserError(f"{path}: memory under distributed_type {kind} is not predicted; DDP, ZeRO and FSDP2 are")
    env = {} if kind == "NO" else _environment(path, processes)
    ranks = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes // machines, "MASTER_PORT": 29500}
    env |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in ranks.items()}
    source = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if source is not None:
        in_repository = path.parent.parent / source  # paths in launch/ are relative to the repository's root
        found = in_repository if in_repository.is_file() else Path(source).resolve()
        env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(found)
        read_deepspeed(env["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    return LaunchEnvironment(processes, machines, env)


ONE_PROCESS = LaunchEnvironment(1, 1, {})


def current_launch_environment() -> LaunchEnvironment:
    """The launch environment in which this process is a rank."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    ranks = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(local)}
    return LaunchEnvironment(processes, processes // local, {**os.environ, **ranks})


def _environment(path: Path, processes: int) -> dict[str, str]:
    """The variables that accelerate's own launcher adds to the environment; torchrun adds the number of ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    arguments = ["--config_file", str(path), "--num_processes", str(processes)]
    arguments += ["--main_process_ip", "127.0.0.1", "--main_process_port", "29500", "--machine_rank", "0", "train.py"]
    with (
        patched("is_port_in_use", lambda port: False),
        guarded(f"--launch {path}: accelerate refuses it", "see the files of launch/ for examples"),
    ):
        args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            _, env = launch.prepare_deepspeed_cmd_env(args)
        else:
            env = launch.prepare_multi_gpu_env(args)
    return {name: value for name, value in env.items() if os.environ.get(name) != value}
