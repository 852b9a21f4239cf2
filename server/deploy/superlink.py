"""Flower's SuperLink with a token required for its Control API, which starts and stops runs.

In Flower 1.41 anyone on the server's machine who reaches its loopback port can use that API, without a key or
a certificate. `serve` makes a new token each time it starts, in a file that only its owner can read. Without
it the SuperLink answers only sites (authenticated by their keys), its own executor (by the kit's secret) and
the processes of runs (by the tokens that Flower gives them).
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx

from atoll.errors import JobError
from atoll.kit.kit import ServerKit
from atoll.system.durable_files import replace_all

HEADER = "x-atoll-control"
TOKEN_FILE = "ATOLL_CONTROL_TOKEN_FILE"
"""The environment variable that holds the token file's path, for the SuperLink's process."""
WITHOUT_TOKEN = ("/v1/fleet/", "/v1/runtime/", "/health")
"""Paths that need no token: they authenticate callers in another way, or reveal nothing."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def token_path(kit: ServerKit) -> Path:
    """The path of the file with the token of the server that runs on the kit."""
    return kit.state / "control.token"


def new_token(kit: ServerKit) -> None:
    """Write a new random token, which only the file's owner can read."""
    kit.state.mkdir(mode=0o700, exist_ok=True)
    replace_all({token_path(kit): secrets.token_hex(32).encode()}, 0o600)


class TokenInterceptor:
    """Adds the token to every call of a client of the Control API."""

    def __init__(self, kit: ServerKit) -> None:
        self._path = token_path(kit)

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        """Add the token's header and make the call; the file is read anew, as a restart changes the token.

        Raises:
            JobError: this user may not read the token's file.
        """
        try:
            context.request.headers[HEADER] = self._path.read_text("ascii")
        except OSError as error:
            raise JobError(f"{self._path}: {error.strerror}; expected the user who runs the server") from None
        return call_next(context)


class TokenMiddleware:
    """Passes requests on to the app that carry the token or need none; others are answered 401."""

    def __init__(self, app: App, token: bytes) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan" or self._may(scope):
            await self.app(scope, receive, send)
            return
        body = b"this needs the token of the server's user"
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _may(self, scope: Scope) -> bool:
        if scope["type"] != "http":
            return False
        tokens = [value for name, value in scope["headers"] if name == HEADER.encode()]
        if any(hmac.compare_digest(value, self.token) for value in tokens):
            return True
        path = scope["path"]
        return ".." not in path and path.startswith(WITHOUT_TOKEN)


def superlink() -> None:
    """Run Flower's SuperLink with the token and with large objects in files; entry point of a process."""
    from flwr.superlink import main
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from starlette.middleware import Middleware

    from atoll.server.deploy.object_files import keep_objects_in_files
    from atoll.server.deploy.renewal import follow_certificates

    keep_objects_in_files()
    follow_certificates()
    token, middleware = Path(os.environ[TOKEN_FILE]).read_bytes(), main._get_middleware
    vars(main)["_get_middleware"] = lambda: [Middleware(TokenMiddleware, token=token), *middleware()]
    flower_superlink()
