"""The parts that every report page is made of."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from rankfold.core import page
from tests.browser import look, needs_browser


def plot(into: Any) -> None:
    line = into.add_subplot().plot([1, 2, 3], [3, 1, 2], color=page.SERIES[0])[0]
    page.tip(line, "a <line>")


def made() -> str:
    cells = [[page.Cell(name), page.Cell(f"{size} kB", size)] for name, size in (("a", 9.0), ("b", 10.0), ("c", 2.0))]
    head = [("name", ""), ("size", "of the file")]
    return page.document("T & <U>", [page.table(head, cells), page.figure("A plot", "what it shows", plot, 3)])


def test_plots_follow_the_theme_and_name_no_one() -> None:
    text = made()
    svg = text[text.index("<svg") : text.index("</svg>")]
    assert "var(--s0)" in svg
    assert "<title>a &lt;line&gt;</title>" in svg
    assert page.SERIES[0] not in svg
    assert "xmlns" not in svg
    assert "<text" in svg  # and not outlines
    assert "<title>T &amp; &lt;U&gt;</title>" in text


def test_the_policy_allows_the_script_of_the_page_and_no_other() -> None:
    text = made()
    script = re.search("<script>(.*)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_the_same_page_every_time() -> None:
    assert made() == made()


@needs_browser
def test_a_click_sorts_by_the_number_and_not_by_its_letters(tmp_path: Path) -> None:
    script = "document.querySelectorAll('th button')[1].click()"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = made().replace("script-src ", f"script-src 'sha256-{digest}' ")
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    (tmp_path / "refused.html").write_text(made().replace("</body>", f"<script>{script}</script></body>"))
    seen = look(tmp_path / "page.html")
    assert re.findall(r"<td class=.words.>(\w)</td>", seen.dom) == ["b", "a", "c"]
    assert 'aria-sort="descending"' in seen.dom
    refused = look(tmp_path / "refused.html")
    assert re.findall(r"<td class=.words.>(\w)</td>", refused.dom) == ["a", "b", "c"]
    assert refused.console


@needs_browser
def test_there_is_a_dark_theme(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(made())
    light, dark = (look(tmp_path / "page.html", height=400, dark=dark).picture for dark in (False, True))
    assert mean(light) > 200
    assert mean(dark) < 70


def mean(picture: bytes) -> float:
    import io

    import numpy as np
    from PIL import Image

    return float(np.asarray(Image.open(io.BytesIO(picture)).convert("L")).mean())


def test_layers_as_a_grid() -> None:
    sites = [
        "model.layers.0.attn.q",
        "model.layers.0.mlp.q",
        "model.layers.2.attn.q",
        "model.layers.2.mlp.down",
        "head",
    ]
    kinds, blocks, at = page.places(sites)
    assert kinds == ["attn.q", "mlp.q", "down", "head"]
    assert blocks == [0, 2]
    assert [at[site] for site in sites] == [(0, 0), (0, 1), (1, 0), (1, 2), (0, 3)]
