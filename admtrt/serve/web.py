"""Common to all routes: errors as JSON, bounded bodies, authentication."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from admtrt.brief import listed
from admtrt.errors import AdmtrtError
from admtrt.serve.admission import RefusedError
from admtrt.serve.schema import faults_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path
    from typing import TypeVar

    from pydantic import BaseModel
    from starlette.types import ASGIApp, Receive, Scope, Send

    Sent = TypeVar("Sent", bound=BaseModel)

_log = logging.getLogger("admtrt.serve")
_UNAVAILABLE = ("draining", "not_ready")
CLIENT_LEFT = 499
"""Status of a request whose client has disconnected; only metrics see it."""
_OPEN = ("/v1/", "/metrics")
"""Paths that need a token where there are tokens."""
_BODIES = 8  # bodies of the largest size read at once


class HttpError(Exception):
    """An error response.

    Attributes:
        status: the HTTP status.
        code: error code for programs.
        message, hint: texts for people.
        retry_after: seconds after which to retry.
        fields: the wrong fields, and why.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        hint: str = "",
        retry_after: float | None = None,
        fields: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint
        self.retry_after, self.fields = retry_after, fields

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        error: dict[str, Any] = {"code": self.code, "message": self.message, "hint": self.hint or None}
        error["retry_after"] = self.retry_after
        return {"error": error if self.fields is None else {**error, "fields": self.fields}}

    @property
    def response(self) -> Response:
        """The response with its headers."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def as_http_error(error: Exception) -> HttpError:
    """Convert any exception. Unexpected ones are logged with an id, and the client gets only the id."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, RefusedError):
        status = 503 if error.reason in _UNAVAILABLE else 429
        return HttpError(status, error.reason, error.message, retry_after=round(error.retry_after, 1))
    if isinstance(error, ValidationError):
        fields = faults_of(error)
        told = listed((f"{one['field']}: {one['message']}" for one in fields), separator="; ")
        return HttpError(422, "invalid_request", told, fields=fields)
    if isinstance(error, AdmtrtError):
        return HttpError(400, "bad_request", error.message, hint=error.hint)
    if isinstance(error, HTTPException):
        return HttpError(error.status_code, "http_error", error.detail)
    if isinstance(error, ClientDisconnect):
        return HttpError(CLIENT_LEFT, "client_left", "the client has left")
    name = secrets.token_hex(4)
    _log.error("fault %s", name, exc_info=error)
    return HttpError(500, "fault", f"something failed in the server; its log tells more under {name}")


@dataclass
class Bodies:
    """Reads request bodies with limits on size, time and number at once.

    Attributes:
        largest: most bytes of a body.
        timeout: seconds to receive a body.
    """

    largest: int
    timeout: float
    _room: int = field(init=False)

    def __post_init__(self) -> None:
        self._room = self.largest * _BODIES

    async def read(self, request: Request, kind: type[Sent]) -> Sent:
        """Read the body and parse it as a model of the schema.

        Raises:
            HttpError, ValidationError: if it is not JSON, too large, too slow, or does not fit the schema.
        """
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != "application/json":
            raise HttpError(415, "not_json", "the body's content-type is not application/json")
        told = request.headers.get("content-length", "")
        expected = (
            min(int(told[:18]), self.largest + 1) if told.isascii() and told.isdigit() else self.largest
        )
        if expected > self.largest:
            raise self._too_large()
        if expected > self._room:
            raise HttpError(429, "queue_full", "too many bodies are on their way", retry_after=1)
        self._room -= expected
        try:
            async with asyncio.timeout(self.timeout):
                body = await self._whole(request)
        except TimeoutError:
            raise HttpError(
                408, "too_slow", f"the body did not come within {self.timeout:g} seconds"
            ) from None
        finally:
            self._room += expected
        return kind.model_validate_json(body)

    async def _whole(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > self.largest:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> HttpError:
        return HttpError(413, "too_large", f"the body has more than {self.largest} bytes")


class Tokens:
    """The clients' names by token. Without tokens, everybody has access."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._names = {hashlib.sha256(token.encode()).digest(): name for token, name in tokens.items()}

    def __bool__(self) -> bool:
        return bool(self._names)

    def name(self, header: str) -> str | None:
        """The client of an ``Authorization`` header, compared in constant time."""
        scheme, _, token = header.partition(" ")
        digest = hashlib.sha256(token.strip().encode()).digest()
        found = None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found if scheme.lower() == "bearer" else None

    @classmethod
    def read(cls, file: Path) -> Tokens:
        """Read a file with one ``TOKEN`` or ``NAME TOKEN`` per line; lines that begin with # are ignored.

        Raises:
            RequestError: if the file cannot be read, has no token, a short one or the same one twice.
        """
        from admtrt.errors import RequestError
        from admtrt.reading import read_small

        try:
            lines = read_small(file, 2**20).decode("utf-8").splitlines()
        except OSError as error:
            raise RequestError(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise RequestError(f"{file} is not in UTF-8") from None
        tokens: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            token = words[-1]
            if len(words) > 2 or len(token) < 16 or token in tokens:
                raise RequestError(
                    f"{file}, line {number}: expected NAME TOKEN, the token of 16 characters or more and "
                    "nobody else's",
                    hint="Python makes good ones: secrets.token_urlsafe(24).",
                )
            tokens[token] = words[0] if len(words) == 2 else f"line {number}"
        if not tokens:
            raise RequestError(f"{file} holds no token", hint="Write one a line.")
        return cls(tokens)


class Guard:
    """ASGI middleware in front of everything: checks the ``Host`` header and the token.

    DNS rebinding: a foreign page can make its own host name resolve to this machine and reach a server
    without tokens, but the browser still sends that name as ``Host``. Such names are refused; IP addresses
    are always allowed.

    Args:
        app: the next application.
        tokens: the clients' tokens.
        hosts: allowed host names, besides localhost and addresses.

    Attributes:
        app: as given.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens, hosts: frozenset[str]) -> None:
        self.app = app
        self._tokens = tokens
        self._hosts = hosts | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            request = Request(scope)
            fault = self._fault(request)
            if fault is not None:
                await fault.response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _fault(self, request: Request) -> HttpError | None:
        host = request.headers.get("host", "")
        if not self._is_ours(host):
            return HttpError(
                421,
                "unknown_host",
                f"this server is not called {host[:100]!r}",
                hint="Start it with --allow-host NAME.",
            )
        preflight = request.method == "OPTIONS"
        if self._tokens and request.url.path.startswith(_OPEN) and not preflight:
            name = self._tokens.name(request.headers.get("authorization", ""))
            if name is None:
                return HttpError(
                    401,
                    "unauthorized",
                    "there is no token, or it is not known",
                    hint="Authorization: Bearer TOKEN",
                )
            request.scope["client_name"] = name
        return None

    def _is_ours(self, header: str) -> bool:
        name = header.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True


def client_of(request: Request) -> str:
    """The name of the client: of its token, else its address."""
    named = request.scope.get("client_name")
    if named is not None:
        return f"token {named}"
    return request.client.host if request.client is not None else ""


def answering(
    handler: Callable[[Request], Awaitable[Response]], counted: Callable[[Request, int], None]
) -> Callable[[Request], Awaitable[Response]]:
    """Wrap a handler: exceptions become error responses, and all responses are counted."""

    async def answer(request: Request) -> Response:
        try:
            response = await handler(request)
        except Exception as error:
            response = as_http_error(error).response
        counted(request, response.status_code)
        return response

    return answer


def dump(data: Any) -> str:
    """Serialise as JSON on one line."""
    return json.dumps(data, allow_nan=False, separators=(",", ":"))
