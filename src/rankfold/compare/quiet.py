"""Imported for what it does: other libraries log advice for programmers, which is none for who types a command."""

import logging

for _name in ("torchao", "torch.utils._pytree", "accelerate", "datasets"):
    logging.getLogger(_name).setLevel(logging.ERROR)
