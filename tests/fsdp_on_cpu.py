"""Runs a script under FSDP on CPUs, where accelerate 1.15 runs DDP instead: it turns a process group into FSDP for GPUs alone.

accelerate launch --config_file launch/fsdp2.yaml --num_processes 2 tests/fsdp_on_cpu.py recipes/full.py --use_cpu
"""

import runpy
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

begin = AcceleratorState.__init__


def begin_as_on_gpus(self: AcceleratorState, *args, fsdp_plugin=None, **kwargs) -> None:
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = begin_as_on_gpus
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
