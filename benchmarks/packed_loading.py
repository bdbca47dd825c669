"""Peak memory of loading a packed SmolLM2-135M, over the bytes that the loaded model has. Linux only.

Resident memory of a fresh process over that after its imports: of loading alone, which leaves what lies in the file
there until it is used, and until every tensor has been read.
The aim is the model as packed and one layer more. The model is that of examples/recipes/gsm8k.yaml.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from calibration_memory import RECIPE, memory

FORMATS = ("int4", "int2", "nf4")


def prepare(folder: Path) -> None:
    """The packed models, in folders of their formats."""
    import rankfold
    from rankfold.quantizers._transformers import save_quantized
    from rankfold.train.display import Display
    from rankfold.train.inputs import load_inputs
    from rankfold.train.recipe_file import read_recipe

    for format in FORMATS:
        model = load_inputs(read_recipe(RECIPE, []), Display()).model
        rankfold.quantize(model, rankfold.Scheme(format=format))
        save_quantized(model, folder / format)


def measure(folder: Path) -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401 (what loading would import is no part of its memory)
    from transformers import AutoModelForCausalLM

    from rankfold.quantizers._transformers import load_quantized

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    model = load_quantized(folder, AutoModelForCausalLM)
    seconds = time.perf_counter() - started
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    size = sum(t.numel() * t.itemsize for t in tensors.values())
    loaded = memory("VmHWM")
    for tensor in tensors.values():
        tensor.detach().flatten()[::512].clone()  # reads each page
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) * 4 for m in model.modules())
    row = {
        "format": folder.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "files MB": sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6,
        "model MB": size / 1e6,
        "peak of loading MB": (loaded - before) / 1e6,
        "peak, all read, MB": (memory("VmHWM") - before) / 1e6,
        "model and a layer MB": (size + largest) / 1e6,
        "seconds": seconds,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        measure(Path(sys.argv[2]))
    else:
        given, rows = harness.arguments(__doc__), []
        with tempfile.TemporaryDirectory() as work:
            prepare(Path(work))
            for format in FORMATS:
                command = [sys.executable, __file__, "--one", str(Path(work) / format)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                rows.append(json.loads(out.splitlines()[-1]))
        harness.report(given, "packed_loading", rows)
