"""Opens the demo's exported adapter in PEFT and compares its logits with Rankfold's on held-out questions.

python examples/demo/check_peft.py RUN        # RUN holds recipe.yaml, adapter/ and peft/
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers.utils import logging

import rankfold
from rankfold.train.models import load_model
from rankfold.train.recipe_file import read_recipe
from rankfold.train.rows import read_split

TOLERANCE = 1e-4
QUESTIONS = 8


@torch.no_grad()
def main(run: Path) -> int:
    logging.disable_progress_bar()
    recipe = read_recipe(run / "recipe.yaml")
    _, held_out = read_split(recipe.data, recipe.seed)
    loaded = load_model(recipe.model, recipe.task)
    batch = loaded.processor(held_out[recipe.data.column("prompt")][:QUESTIONS], padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()

    def logits(model: torch.nn.Module) -> Tensor:
        # In float32 the two libraries' orders of summation alone cost up to the tolerance.
        return model.double().eval()(**batch).logits[real]

    plain = logits(loaded.model)
    theirs = logits(PeftModel.from_pretrained(load_model(recipe.model, recipe.task).model, run / "peft"))
    rankfold.load(loaded.model, run / "adapter")
    ours = logits(loaded.model)

    difference, change = (ours - theirs).abs().max().item(), (ours - plain).abs().max().item()
    print(f"PEFT's logits differ from Rankfold's by at most {difference:.1e} ({int(real.sum())} tokens)")
    print(f"(allowed: {TOLERANCE:.0e}; the adapter itself changes them by up to {change:.1f})")
    # Two copies of the plain model would agree as well.
    return 0 if difference <= TOLERANCE < change else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
