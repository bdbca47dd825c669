"""The comparisons that ship, and the script that prepares their data."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rankfold.compare.plan import read_plan, recipe_of
from rankfold.train.plan import build_parts

FOLDER = Path(__file__).parents[2] / "comparisons"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_comparison_can_be_read(path: Path) -> None:
    plan = read_plan(path)
    for entry in plan.contenders:
        build_parts(recipe_of(plan, entry, path.name))
    assert f"rankfold compare comparisons/{path.name}" in path.read_text()


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive(**members: str) -> tarfile.TarFile:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            made.addfile(info, io.BytesIO(text.encode()))
    file.seek(0)
    return tarfile.open(fileobj=file)


def test_mails_become_rows(prepare: ModuleType) -> None:
    html = "Subject: Win\nContent-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: text/plain\n\nnow\n--x--\n"
    mails = {"package/data/easy-ham-1/1.txt": "Subject: Hello\n\nDear all", "package/data/spam-2/2.txt": html}
    ((name, content),) = prepare.spam(archive(**mails, **{"package/README.md": "no mail"}))
    assert name == "spam.jsonl"
    assert [json.loads(line) for line in content.splitlines()] == [
        {"text": "Hello\nDear all", "label": "ham"}, {"text": "Win\nnow", "label": "spam"},
    ]  # fmt: skip


def test_digits_become_arrays(prepare: ModuleType) -> None:
    digits = {f"package/src/digits/{i}.json": json.dumps({"data": [i / 10] * 784 * 2}) for i in (0, 5)}
    ((_, content),) = prepare.digits(archive(**digits))
    arrays = np.load(io.BytesIO(content))
    assert arrays["image"].shape == (4, 28, 28)
    assert arrays["image"][2, 0, 0] == round(0.5 * 255)
    assert arrays["label"].tolist() == [0, 0, 5, 5]


def test_instructions_get_one_prompt(prepare: ModuleType) -> None:
    rows = [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Sing", "input": "", "output": "la"}]
    given = {"x/data/alpaca_en_demo.json": json.dumps(rows), "x/data/wiki_demo.txt": "words"}
    made = dict(prepare.instructions(archive(**given)))
    assert [row["prompt"] for row in json.loads(made["alpaca.json"])] == ["Add\n\n1 2", "Sing"]
    assert made["wiki.txt"] == b"words"
