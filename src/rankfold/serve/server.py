"""An application on an address: who may reach it, and how it stops."""

import ipaddress
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from rankfold.errors import RankfoldError


def is_loopback(host: str) -> bool:
    """Whether only this machine's own programs reach that address. Raises RankfoldError where it is none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RankfoldError(f"--host: {host!r} is no address of this machine: {error}") from error
    return all(ipaddress.ip_address(str(one[4][0]).partition("%")[0]).is_loopback for one in found)


def check_key(host: str, api_key: str | None) -> None:
    """Refuse to serve other machines without a key, or anybody with one that says nothing."""
    if api_key is not None and (not api_key.strip() or not api_key.isprintable() or not api_key.isascii()):
        raise RankfoldError("--api-key: a key is one word of ASCII letters, digits or signs")
    if api_key is None and not is_loopback(host):
        raise RankfoldError(
            f"--host: {host} can be reached from other machines: set a key in RANKFOLD_API_KEY (or by --api-key), or "
            "serve 127.0.0.1"
        )


def bind(host: str, port: int) -> socket.socket:
    """The address, taken; port 0 takes any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise RankfoldError(f"--port: {host}:{port} cannot be served: {error}") from error
    return made


class Server(uvicorn.Server):
    """Answers at an address that is taken. Told to stop once, it answers what it has accepted; told again, it stops
    at once, and `signal` is the number of that second signal. `ready` is called at the beginning."""

    signal: int | None = None

    def __init__(self, app: Any, ready: Callable[[], None]):
        options: dict[str, Any] = {"lifespan": "off", "log_config": None, "access_log": False}
        private: dict[str, Any] = {"server_header": False, "proxy_headers": False}
        super().__init__(uvicorn.Config(app, http="h11", ws="none", **options, **private))
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit, self.signal = True, sig
        self.should_exit = True
