"""`torchrun -m tests.train.sharded train ...`: the command line under FSDP2 on CPUs.

Accelerate allows FSDP on accelerators alone; here it is told that these CPU processes are some.
"""

import os
import sys

import torch
from accelerate.state import DistributedType, PartialState

os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda self, *arguments, **options: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))

from rankfold.cli import main  # noqa: E402

main(sys.argv[1:])
