"""The browser that the tests look at pages with does notice what a page asks for."""

from pathlib import Path

import pytest

from tests.browser import addresses, look, needs_browser

_POLICY = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'


@needs_browser
def test_requests_are_seen_whether_a_policy_blocks_them_or_not(tmp_path: Path) -> None:
    body = "<h1>seen</h1><img src='http://pictures.invalid/x.png'>"
    (tmp_path / "open.html").write_text(body)
    (tmp_path / "closed.html").write_text(_POLICY + body)
    free, closed = look(tmp_path / "open.html"), look(tmp_path / "closed.html")
    assert free.requests == ["http://pictures.invalid/x.png"]
    assert "<h1>seen</h1>" in free.dom
    assert free.picture.startswith(b"\x89PNG")
    assert closed.requests == []
    assert any("pictures.invalid" in line for line in closed.console)


@pytest.mark.parametrize(
    "text",
    [
        "<img src='http://a/x.png'>",
        "<script src=//a/x.js>",
        '<a href="x.html">',
        "<style>p { background: url(https://a/x) }",
        "@import 'https://a/x.css'",
        '<use xlink:href="other.svg#m1"/>',
    ],
)
def test_addresses_are_found(text: str) -> None:
    assert len(addresses(text)) == 1


def test_what_a_page_holds_itself_is_no_address() -> None:
    assert addresses("<img src='data:image/png;base64,x'><use xlink:href='#m1'/><g clip-path='url(#c)'>") == []
