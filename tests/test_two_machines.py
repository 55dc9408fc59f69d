"""Two network namespaces as two machines: rendezvous with the flags of launch/two_machines.yaml, loss of one, restart of both."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import BIN, ROOT
from reliability import Run
from test_survival import RESUME, SMALL, TRAIN, furthest, trained

from toolkit.training.checkpoints import damage, newest_first

ADDRESSES = ("10.77.0.1", "10.77.0.2")
LIMIT = 60  # seconds that a rank waits for another
SETTINGS = {"GLOO_SOCKET_IFNAME": "lan"}
STEPS = ("--max_steps", "16", "--save_steps", "2", "--ddp_timeout", str(LIMIT))


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def hosts():
    """The names of two namespaces connected by one virtual cable, `lan` in both; all their processes are killed at the end."""
    names = [f"footprint{os.getpid()}-{number}" for number in (0, 1)]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", "lan", "netns", names[0], "type", "veth", "peer", "name", "lan", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "lan")
                for device in ("lo", "lan"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
            pytest.skip(f"network namespaces cannot be made here: they take root and `ip` of iproute2 ({reason})")
        yield names
    finally:
        for name in made:
            end(name)
            ip("netns", "del", name)


def end(host):
    """Kills all processes on `host`."""
    for pid in ip("netns", "pids", host).split():
        os.kill(int(pid), signal.SIGKILL)


class LaunchEnvironment:
    """Starts the same command on both machines with accelerate's launcher, except for the machine's rank; `folder` gets the output."""

    def __init__(self, hosts, folder, *argv):
        folder.mkdir()
        self.logs = [folder / f"{rank}.txt" for rank in (0, 1)]
        self.launchers = []
        for rank, host in enumerate(hosts):
            meet = ("--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0], "--main_process_port", "29500")
            command = [BIN / "accelerate", "launch", "--config_file", "launch/two_machines.yaml", *meet, *argv]
            env = {**os.environ, **SETTINGS, "PYTHONPATH": str(ROOT)}
            with self.logs[rank].open("w") as log:
                started = subprocess.Popen(
                    ["ip", "netns", "exec", host, *map(str, command)],
                    cwd=ROOT,
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self.launchers.append(started)

    def text(self):
        return "\n".join(log.read_text() for log in self.logs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.long)])
def test_two_machines_resume_to_the_same_weights_after_one_was_lost(lost, hosts, tmp_path):
    """The remaining machine waits for the lost one no longer than --ddp_timeout. Then it names the lost rank, or says that the
    rendezvous machine was lost.

    accelerate's launcher starts the first run on both machines. Forks resume it, because they do not repeat the imports.
    """
    folder, whole = tmp_path / "run", tmp_path / "whole"
    trained(whole, "--max_steps", "16", "--save_steps", "16", processes=2)
    argv = (TRAIN, *SMALL, *STEPS, "--output_dir", folder)
    run = LaunchEnvironment(hosts, tmp_path / "first", *argv)
    began = time.monotonic()
    while not (folder / "checkpoint-2").exists():
        assert all(one.poll() is None for one in run.launchers) and time.monotonic() < began + 900, run.text()
        time.sleep(0.01)
    left = 1 - lost
    ip("-n", hosts[lost], "link", "set", "lan", "down")
    end(hosts[lost])
    began = time.monotonic()
    assert run.launchers[left].wait(LIMIT + 120) == 1, run.text()
    assert time.monotonic() < began + LIMIT + 30
    said = run.logs[left].read_text()
    who = "rank 1" if lost else "rank 1: the rank or launcher that keeps the store"
    assert said.count("error: ") == 1 and f"error: {who} did not answer within --ddp_timeout" in said, said
    run.launchers[lost].wait(60)
    assert not (folder / "adapter_model.safetensors").exists()
    assert all(damage(kept) is None for kept in newest_first(folder))
    ip("-n", hosts[lost], "link", "set", "lan", "up")
    meet = SETTINGS | {"MASTER_ADDR": ADDRESSES[0]}
    again = Run(*argv, RESUME, log=tmp_path / "again", processes=2, preset="two_machines", hosts=hosts, settings=meet)
    assert again.wait() == [0, 0], again.text()
    assert re.search(r"resuming +from .*checkpoint-\d+", again.text())
    assert furthest(whole, folder) <= 1e-6
