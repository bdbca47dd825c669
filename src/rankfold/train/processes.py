"""This process among those that train together (`accelerate launch`, `torchrun`)."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Accelerate's view of them: `is_main_process`, `device`, `wait_for_everyone()`.

    Without an accelerator it has to be told to use the CPU from the start; else it takes several processes for as many
    runs, and each would write the same output.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
