"""Rankfold: every way to adapt a pretrained model cheaply, on one mechanism."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# What the package offers, by the module it lives in: imported on first use, so that `import rankfold` stays quick.
_PUBLIC = {
    "rankfold.compose._merge": ("combine",),
    "rankfold.compose.compress": ("compress",),
    "rankfold.compose.lorahub": ("lorahub",),
    "rankfold.compose.portllm": ("port", "unport"),
    "rankfold.compose.similar": ("similar",),
    "rankfold.compose.squeeze": ("squeeze",),
    "rankfold.core.adapter": ("Adapter",),
    "rankfold.core.attach": ("attach",),
    "rankfold.core.calibration": ("Calibration", "calibrate"),
    "rankfold.core.checkpoint": ("load", "save"),
    "rankfold.core.codebooks": ("Codebooks",),
    "rankfold.core.component": ("build",),
    "rankfold.core.control": ("adapters", "detach", "rename", "set_active", "using"),
    "rankfold.core.convert": ("as_lora",),
    "rankfold.core.merging": ("merge", "unmerge"),
    "rankfold.core.peft": ("export_peft", "import_peft"),
    "rankfold.core.packed": ("Scheme",),
    "rankfold.core.registry": ("methods",),
    "rankfold.core": ("Callback", "Delta", "Init", "Method", "Optimizer", "Site"),
    "rankfold.errors": ("AdapterFileError", "RankfoldError", "UnsupportedError"),
    "rankfold.quantizers._quantizer": ("quantize",),
    "rankfold.quantizers._transformers": ("load_quantized", "save_quantized"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

if TYPE_CHECKING:
    from rankfold.compose._merge import combine
    from rankfold.compose.compress import compress
    from rankfold.compose.lorahub import lorahub
    from rankfold.compose.portllm import port, unport
    from rankfold.compose.similar import similar
    from rankfold.compose.squeeze import squeeze
    from rankfold.core import Callback, Delta, Init, Method, Optimizer, Site
    from rankfold.core.adapter import Adapter
    from rankfold.core.attach import attach
    from rankfold.core.calibration import Calibration, calibrate
    from rankfold.core.checkpoint import load, save
    from rankfold.core.codebooks import Codebooks
    from rankfold.core.component import build
    from rankfold.core.control import adapters, detach, rename, set_active, using
    from rankfold.core.convert import as_lora
    from rankfold.core.merging import merge, unmerge
    from rankfold.core.packed import Scheme
    from rankfold.core.peft import export_peft, import_peft
    from rankfold.core.registry import methods
    from rankfold.errors import AdapterFileError, RankfoldError, UnsupportedError
    from rankfold.quantizers._quantizer import quantize
    from rankfold.quantizers._transformers import load_quantized, save_quantized


def __getattr__(name: str) -> Any:
    """The public functions, and every registered component by its class name (`rankfold.LoRA`)."""
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name[:1].isupper():
        from rankfold.core.component import components

        for cls in components():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'rankfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
