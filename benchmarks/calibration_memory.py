"""Peak memory of starting from data (calibrating, then attaching), over the model's own bytes: EVA, CorDA, LoRA-GA.

The model and the data are those of examples/recipes/gsm8k.yaml, the settings its defaults; each init gets a process of
its own. What the model itself and the libraries take is not counted. Linux only.
"""

import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import harness

INITS = ("eva", "corda", "lora-ga")
RECIPE = Path(__file__).parents[1] / "examples/recipes/gsm8k.yaml"


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(init: str, batches: int, threads: int) -> None:
    """Load the recipe's model and data, then calibrate and attach; print a row of figures."""
    import torch

    import rankfold
    from rankfold.train.calibrating import collect, targets_of
    from rankfold.train.display import Display
    from rankfold.train.inputs import load_inputs
    from rankfold.train.plan import build_parts
    from rankfold.train.recipe_file import read_recipe

    torch.set_num_threads(threads)
    recipe = read_recipe(RECIPE, [f"init={init}", f"calibration.batches={batches}"])
    parts, inputs = build_parts(recipe), load_inputs(recipe, Display())
    own = sum(parameter.numel() * parameter.itemsize for parameter in inputs.model.parameters())
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading left behind shall not hide what comes now
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    started = time.perf_counter()
    found = collect(inputs, parts, Display())
    collected, peak = time.perf_counter() - started, memory("VmHWM")
    rankfold.attach(inputs.model, parts.method, targets_of(recipe), init=parts.init, calibration=found)
    row = {
        "init": init,
        "batches": batches,
        "model MB": own / 1e6,
        "collecting over model": (peak - before) / own,
        "in all over model": (memory("VmHWM") - before) / own,
        "target": 1.5,
        "collecting s": collected,
        "in all s": time.perf_counter() - started,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] == "--one":
        measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        given, rows = harness.arguments(__doc__, batches=4), []
        for init in INITS:
            command = [sys.executable, __file__, "--one", init, str(given.batches), str(given.threads)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
        harness.report(given, "calibration_memory", rows)
