"""Runs a script with FSDP over CPU processes, which accelerate offers for accelerators only.

python -m torch.distributed.run … tests/cpu_fsdp.py train.py …, with the variables that `accelerate launch` would set.
"""

import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

initialize = PartialState.__init__


def initialize_as_accelerator(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = initialize_as_accelerator
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
runpy.run_path(sys.argv[0], run_name="__main__")
