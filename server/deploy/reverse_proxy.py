"""A TLS reverse proxy on the public port that forwards only the SuperLink calls that a site needs.

Flower's SuperLink serves its Control, Fleet and Runtime APIs on one port without authenticating users, so it
listens on loopback only, and this proxy forwards exactly the paths below. Any other path is answered 403 and
never reaches the SuperLink.
"""

import asyncio
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from atoll.errors import ConfigError
from atoll.kit.kit import Address, ServerKit, is_address
from atoll.server.deploy.connection_limits import IDLE_SECONDS, ConnectionLimits, LimitedListener
from atoll.server.deploy.heard import KEY_HEADER, LastHeard
from atoll.server.deploy.renewal import following

logger = logging.getLogger(__name__)

ALLOWED_PATHS = frozenset(
    f"/v1/fleet/{call}".encode()
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
HOP_BY_HOP = frozenset({"host", "connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})
BODY_LIMIT = 32 * 2**20
"""The most bytes of a request's body; Flower sends arrays in objects of at most 5 MiB."""
BODY_SECONDS = 60.0
HEAD_LIMIT = 64 * 1024
"""The most bytes of a request's head."""
FROM_A_SITE = 200
"""The status of the SuperLink's answers to calls that are signed with a site's key."""
ACTIVATE, IS_ACTIVE = b"/v1/fleet/activate-node", 412
"""The call by which a site connects, and the answer's status if that site is connected already."""


def listen(address: Address) -> socket.socket:
    """A socket that listens on the port: on loopback if the host is loopback, else on all interfaces.

    Raises:
        ConfigError: the port can't be listened on.
    """
    local = address.host in ("localhost", "::1") or address.host.startswith("127.")
    host = address.host if local and is_address(address.host) else "127.0.0.1" if local else ""
    try:
        if host == "" and socket.has_dualstack_ipv6():
            return socket.create_server(("", address.port), family=socket.AF_INET6, dualstack_ipv6=True)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, address.port), family=family)
    except OSError as error:
        raise ConfigError(f"server.port: cannot listen on port {address.port}: {error.strerror}") from error


class ReverseProxy:
    """Forwards the sites' calls from the public socket to the SuperLink, in a thread of its own."""

    def __init__(
        self,
        kit: ServerKit,
        listener: socket.socket,
        superlink: str,
        limits: ConnectionLimits | None = None,
        heard: LastHeard | None = None,
        tell: Callable[[str], None] = logger.info,
    ) -> None:
        self.limits, self.last_heard = limits or ConnectionLimits(), heard or LastHeard()
        self._upstream = f"https://{superlink}"
        self._client = httpx.AsyncClient(
            verify=ssl.create_default_context(cafile=str(kit.authority)), timeout=120, trust_env=False
        )
        config = uvicorn.Config(
            self._answer,
            ssl_certfile=str(kit.certificate),
            ssl_keyfile=str(kit.key),
            ssl_context_factory=lambda _, build: following(build, (kit.certificate, kit.key), tell),
            interface="asgi3",
            http="h11",  # which bounds a request's head
            h11_max_incomplete_event_size=HEAD_LIMIT,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(IDLE_SECONDS),
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        self._listener = LimitedListener.of(listener, self.limits)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gate", daemon=True)

    def start(self) -> None:
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=5)

    async def _serve(self) -> None:
        """Serve on asyncio's event loop, which accepts connections through the limited listener."""
        watching = asyncio.create_task(self.limits.watch())
        try:
            await self._server.serve([self._listener])
        finally:
            watching.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        key = scope["client"] or ("", 0)
        self.limits.asks(key)
        is_from_site = False
        try:
            request = Request(scope, receive)
            response = await self._pass_on(request)
            is_from_site = response.status_code == FROM_A_SITE
            if is_from_site:
                self.last_heard.heard(request.headers.get(KEY_HEADER))
            elif (scope.get("raw_path"), response.status_code) == (ACTIVATE, IS_ACTIVE):
                self.last_heard.refused(request.headers.get(KEY_HEADER), key[0])
            await response(scope, receive, send)
        finally:
            self.limits.answered(key, by_a_site=is_from_site)

    async def _pass_on(self, request: Request) -> Response:
        path: bytes = request.scope.get("raw_path") or b""
        if request.method != "POST" or path not in ALLOWED_PATHS:
            return PlainTextResponse("this port is for the sites of the federation only\n", 403)
        try:
            body = await asyncio.wait_for(_body(request), BODY_SECONDS)
        except (TimeoutError, ClientDisconnect):
            return PlainTextResponse("the request did not arrive in time\n", 408)
        if body is None:
            return PlainTextResponse("the request is too large\n", 413)
        return await self._forward(path.decode("ascii"), request, body)

    async def _forward(self, path: str, request: Request, body: bytes) -> Response:
        headers = {k: v for k, v in request.headers.items() if k not in HOP_BY_HOP | {"content-length"}}
        try:
            answer = await self._client.post(self._upstream + path, content=body, headers=headers)
        except httpx.TransportError as error:
            logger.warning("the SuperLink does not answer: %s", type(error).__name__)
            return PlainTextResponse("the server is starting again\n", 503)
        drop = HOP_BY_HOP | {"content-length", "content-encoding"}
        passed_on = {k: v for k, v in answer.headers.items() if k not in drop}
        return Response(answer.content, answer.status_code, headers=passed_on)


async def _body(request: Request) -> bytes | None:
    """The request's body; None as soon as it exceeds `BODY_LIMIT`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            return None
    return bytes(body)
