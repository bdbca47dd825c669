"""A page as a browser sees it: Chromium without a screen and without a network."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (apt-get install chromium)")

_ADDRESS = re.compile(
    r"""(?:\b(?:src|href|srcset|action|data|poster)\s*=\s*|\burl\(\s*|@import\s+)["']?\s*([^"'\s>)]+)"""
)
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--enable-logging=stderr",
]  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """`dom` once scripts have run, the `picture` (PNG), the `requests` that the page made to the network (none of which
    is answered), and what the `console` says: there a Content-Security-Policy tells what it has blocked."""

    dom: str
    picture: bytes
    requests: list[str]
    console: list[str]


def look(page: Path, *, width: int = 1200, height: int = 2000, dark: bool = False) -> Seen:
    """Open a file. Host names lead nowhere, so what the page shows is in the file."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as place:
        picture, log = Path(place, "page.png"), Path(place, "net.json")
        made = subprocess.run(
            [
                CHROMIUM, *_FLAGS, *(["--force-dark-mode"] if dark else []), "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={place}/profile", f"--log-net-log={log}", f"--window-size={width},{height}",
                f"--screenshot={picture}", "--dump-dom", page.resolve().as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        # The browser asks for things of its own; those of the page have an initiator, which is "null" for a file.
        events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
        asked = [params["url"] for params in events if params.get("initiator", "not an origin") != "not an origin"]
        console = re.findall(r"CONSOLE[^\]]*\] (.*)", made.stderr)
        return Seen(made.stdout, picture.read_bytes(), asked, console)


def addresses(text: str) -> list[str]:
    """What a page refers to outside itself: everything but data: and its own anchors."""
    found = [html.unescape(address) for address in _ADDRESS.findall(text)]
    return [address for address in found if not address.startswith(("data:", "#"))]
