"""What starting costs: `import rankfold` and `rankfold --help` stay quick because they load nothing they do not need.

Times are processor time of a fresh process, the best of three, so that a busy machine does not change the answer.
"""

import json
import os
import subprocess
import sys

HEAVY = {"torch", "transformers", "accelerate", "datasets", "peft", "matplotlib", "pandas"}


def fresh(*arguments: str) -> tuple[str, float]:
    """Standard output of `python ARGUMENTS`, and the processor time it took in seconds."""
    before = os.times()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    after = os.times()
    return done.stdout, sum(after[2:4]) - sum(before[2:4])


def loaded_by(code: str) -> set[str]:
    out, _ = fresh(
        "-c", f"import json, sys\n{code}\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    )
    return set(json.loads(out.splitlines()[-1]))


def test_import_is_quick() -> None:
    code = "import time, torch; start = time.process_time(); import rankfold; print(time.process_time() - start)"
    assert min(float(fresh("-c", code)[0]) for _ in range(3)) <= 0.3


def test_attaching_needs_no_model_library_and_no_trainer() -> None:
    code = "import torch, rankfold; rankfold.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), rankfold.LoRA(rank=2))"
    assert not loaded_by(code) & (HEAVY - {"torch"} | {"rich", "typer"})


def test_the_command_line_imports_no_torch() -> None:
    assert not loaded_by("import rankfold.cli") & HEAVY


def test_help_answers_at_once() -> None:
    answers = [fresh("-m", "rankfold", "--help") for _ in range(3)]
    assert "Usage: rankfold" in answers[0][0]
    assert min(seconds for _, seconds in answers) <= 0.5
