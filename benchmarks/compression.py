"""What compressing a real adapter saves and costs: bytes on disk, their ratio over 16 bits a number, held-out loss.

A LoRA on all linears of SmolLM2-135M, trained on GSM8K as the example recipe does. ComPEFT's α is chosen on rows that
are neither trained on nor among those of the loss. The trained adapter is kept in the user's cache.
"""

import tempfile
from pathlib import Path

import harness

import rankfold
from rankfold.compose._compression import Compression
from rankfold.compose.compeft import grid
from rankfold.compose.compress import compress
from rankfold.core.control import detach, using
from rankfold.train.display import Display
from rankfold.train.evaluate import evaluate
from rankfold.train.inputs import load_inputs
from rankfold.train.places import cache_dir
from rankfold.train.recipe_file import read_recipe
from rankfold.train.run import train

RECIPE = Path(__file__).parents[1] / "examples/recipes/gsm8k.yaml"
DENSITIES, ALPHAS, BITS = (0.05, 0.1, 0.2, 0.3, 0.5), (1, 2, 4), (1, 2, 4)

CHOOSING = 4  # rows that α is chosen on


def main() -> None:
    given = harness.arguments(__doc__, steps=12, rows=12)
    changes = ["data.max_length=128", f"data.held_out.limit={given.rows}", f"budget.steps={given.steps}"]
    changes += [f"evaluate.steps={given.steps}", "checkpoint.steps=10", "samples.count=0"]
    recipe, folder = read_recipe(RECIPE, changes), cache_dir() / f"compression-{given.steps}"
    if not (folder / "adapter").exists():
        train(recipe, folder, resume=True)
    inputs = load_inputs(recipe, Display())
    model, rows = inputs.model, list(inputs.data.held_out)
    adapter = rankfold.load(model, folder / "adapter")

    def loss(part: list) -> float:
        batches = (inputs.data.collate(part[i : i + 4]) for i in range(0, len(part), 4))
        return evaluate(model, batches, recipe.task).loss

    choosing, judged = rows[:CHOOSING], rows[CHOOSING:]
    with using(model, None):
        base = loss(judged)
    table = [{"what": "no adapter", "loss": base}]
    before = sum(file.stat().st_size for file in (folder / "adapter").iterdir())
    numbers = adapter.num_parameters()
    table.append({"what": "float32", "bytes": before, "over 16 bits": 2 * numbers / before, "loss": loss(judged)})

    def add(name: str, how: Compression, **more: float) -> None:
        with tempfile.TemporaryDirectory() as to:
            path, report = compress(folder / "adapter", how, Path(to) / "small")
            small = rankfold.load(model, path, "small", active=False)
            with using(model, "small"):
                found = loss(judged)
            detach(model, small.name)
        error = sum(layer.error for layer in report.layers.values()) / len(report.layers)
        row = {"bytes": report.after, "codes": report.code, "over 16 bits": report.ratio, "mean error": error}
        table.append({"what": name, **more, **row, "loss": found})
        print(table[-1], flush=True)

    for bits in BITS:
        add(f"onebit, {bits} bits", rankfold.OneBit(bits=bits))
    for name, from_start, densities in (("compeft", False, DENSITIES), ("compeft from start", True, DENSITIES[::2])):
        for density in densities:
            how = rankfold.ComPEFT(from_start=from_start)
            best, _ = grid(adapter, lambda: loss(choosing), (density,), ALPHAS, how)
            add(f"{name}, {density:.0%}", best, alpha=best.alpha)
    harness.report(given, "compression", table)


if __name__ == "__main__":
    main()
