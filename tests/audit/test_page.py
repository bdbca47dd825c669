"""The audit's page: that it says what was found, opens without a network, and trusts no name."""

from dataclasses import replace
from pathlib import Path

import rankfold
from rankfold.audit.page import page
from rankfold.audit.report import Limits, alarms, audit
from rankfold.audit.safety import compare
from tests.audit.test_report import adapted, blocks
from tests.browser import addresses, look, needs_browser


@needs_browser
def test_a_browser_shows_plots_and_tables_without_a_network(tmp_path: Path) -> None:
    model, adapter = adapted(size=3.0)
    other = rankfold.attach(model, rankfold.LoRA(rank=2), targets=["q_proj"], name="other")
    for delta in other.deltas.values():
        delta.B.data.normal_()
    lost = compare(["Sorry"] * 100, ["Sorry"] * 80 + ["Yes"] * 20, opening=-0.4)
    made = audit(model, "default", others=["other"], blocks=blocks(), refusals=(lost, compare(["Yes"], ["Yes"])))
    (tmp_path / "audit.html").write_text(page(made))
    seen = look(tmp_path / "audit.html")
    assert seen.requests == []
    assert seen.console == []  # the page's own policy had nothing to refuse
    assert seen.dom.count("<svg") == 5
    assert seen.dom.count("<table") == 3
    for row in made.rows:
        assert f">{row.site}</td>" in seen.dom
    for words in ("refusals lost", "100 → 80", "nats a token forgotten", "intruders in 8 weights", "other: left"):
        assert words in seen.dom
    assert len(seen.picture) > 50_000
    assert adapter.name in seen.dom


def test_what_was_not_measured_is_said_and_nothing_else_is_referred_to() -> None:
    model, _ = adapted(size=0.0)
    text = page(audit(model))
    assert "Nothing here is a pass" in text
    assert "the probes were not run" in text
    assert text.count("<svg") == 3
    assert addresses(text) == []
    assert "default-src 'none'" in text
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text


def test_names_from_a_file_are_escaped() -> None:
    model, _ = adapted(size=3.0)
    made = audit(model)
    hostile = "<script>alert(1)</script>"
    made.rows[0] = replace(made.rows[0], site=hostile)
    made.alarms = alarms(made, Limits())
    made.adapter = f'"{hostile}'
    text = page(made)
    assert hostile not in text
    assert text.count("<script>") == 1  # the page's own
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
