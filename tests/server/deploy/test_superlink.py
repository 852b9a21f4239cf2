"""Who is let through to the part of the SuperLink that starts and stops runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from atoll.errors import JobError
from atoll.kit.kit import ServerKit
from atoll.server.deploy.provision import provision
from atoll.server.deploy.superlink import HEADER, TokenInterceptor, TokenMiddleware, new_token, token_path
from tests.kit.test_provision import GOOD, written

TOKEN = b"a" * 64


def status(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> int | None:
    """What the middleware answers; 200 where the request reached the app; None where it wasn't told."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> None: ...

    scope = {"type": kind, "path": path, "headers": list(headers)}
    asyncio.run(TokenMiddleware(app, TOKEN)(scope, receive, send))
    return next((one["status"] for one in sent if "status" in one), None)


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/docs", "/", "/v2/fleet/x", "/v1/fleet/../control/x"]
)
def test_all_but_what_has_another_lock_wants_the_token(path: str) -> None:
    given = HEADER.encode()
    assert status(path) == 401
    assert status(path, (given, TOKEN[:-1])) == 401
    assert status(path, (given, b"")) == 401
    assert status(path, (b"authorization", TOKEN)) == 401
    assert status(path, (given, TOKEN)) == 200


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/runtime/acquire-task", "/health"])
def test_sites_and_runs_are_let_through_to_their_own_locks(path: str) -> None:
    assert status(path) == 200


def test_sockets_that_speak_no_http_are_refused() -> None:
    assert status("/v1/fleet/x", kind="websocket") == 401


def test_a_token_is_new_each_time_and_for_the_servers_user_alone(tmp_path: Path) -> None:
    kit = ServerKit.load(provision(written(tmp_path, GOOD), tmp_path / "kits")[0])
    request = SimpleNamespace(request=httpx.Request("POST", "https://127.0.0.1/"))
    with pytest.raises(
        JobError, match=r"control\.token: No such file .* expected the user who runs the server"
    ):
        TokenInterceptor(kit).intercept(request, lambda context: httpx.Response(200))
    new_token(kit)
    first = token_path(kit).read_text()
    assert token_path(kit).stat().st_mode & 0o777 == 0o600 and kit.state.stat().st_mode & 0o777 == 0o700
    client = TokenInterceptor(kit)
    client.intercept(request, lambda context: httpx.Response(200))
    assert request.request.headers[HEADER] == first and len(first) == 64
    new_token(kit)
    client.intercept(request, lambda context: httpx.Response(200))
    assert request.request.headers[HEADER] == token_path(kit).read_text() != first
