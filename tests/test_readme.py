"""The README is true: its table is the registry's, and its Python runs."""

import re
import subprocess
import sys
from pathlib import Path

from docs.methods_table import README


def test_table_of_methods_is_current() -> None:
    """In a process of its own, since other tests register components of theirs."""
    script = "from docs.methods_table import *; print(rewritten(README.read_text(encoding='utf-8')), end='')"
    current = subprocess.run([sys.executable, "-c", script], check=True, cwd=README.parent, capture_output=True)
    assert current.stdout.decode() == README.read_text(encoding="utf-8"), "run `make docs`"


def test_every_link_to_a_file_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_the_method_in_one_file_runs(tmp_path: Path) -> None:
    """The README's own example of a new method, put in a file, attaches, merges, saves and loads."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    method = next(block for block in blocks if "class " in block and "Method" in block)
    slug = re.search(r'slug: ClassVar\[str\] = "([^"]+)"', method)
    assert slug is not None
    (tmp_path / "mine.py").write_text(method)
    script = (
        "import torch, mine, rankfold\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)).double()\n"
        "x = torch.randn(3, 8).double()\n"
        "before = model(x)\n"
        f"adapter = rankfold.attach(model, rankfold.build({slug.group(1)!r}), targets=['0', '1'])\n"
        "assert torch.allclose(model(x), before)\n"
        "for p in adapter.parameters(): torch.nn.init.normal_(p)\n"
        "y = model(x)\n"
        "assert not torch.allclose(y, before)\n"
        "rankfold.save(model, 'out'); rankfold.merge(model); assert torch.allclose(model(x), y)\n"
        "rankfold.detach(model); assert torch.equal(model(x), before)\n"
        "rankfold.load(model, 'out'); assert torch.allclose(model(x), y)\n"
        "with rankfold.using(model, ['default', None, 'default']): assert torch.allclose(model(x)[1], before[1])\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
