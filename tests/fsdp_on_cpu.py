"""Runs a script under FSDP on CPUs. accelerate 1.15 would run DDP instead: it only sets up FSDP on GPUs.

accelerate launch --config_file launch/fsdp2.yaml --num_processes 2 tests/fsdp_on_cpu.py recipes/full.py --use_cpu
"""

import runpy
import sys

from accelerate.state import AcceleratorState

from toolkit.memory.shadow.simulated_rank import begin_as_on_gpus
from toolkit.runs import preflight

if __name__ == "__main__":
    preflight.check_fsdp = lambda engine, training: None
    AcceleratorState.__init__ = begin_as_on_gpus(AcceleratorState.__init__)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
