"""Who may ask: a check of every request before anything looks at it, and the headers that every answer bears.

- `Host` must be a name that the viewer goes by. A page elsewhere whose name is made to point at 127.0.0.1 (DNS
  rebinding) still sends its own.
- Where a token is set, it must come as a cookie, or as `Authorization: Bearer`. The address that is printed at the
  start carries it; the page that it opens sets the cookie, which no script can read and no other site sends.
- Pages of other sites get nothing of the API (`Sec-Fetch-Site`), and can neither frame nor embed it.
- There is nothing to send to: whatever has a body or is no GET is refused.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "medclip"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MOST_QUERY = 4096  # bytes of an address
# The rule that OpenSeadragon 6.1 puts into every page (about the focus ring on touch screens), and nothing else inline.
_STYLE = "sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE="
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    f"style-src 'self' '{_STYLE}'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_LOGIN = (
    "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    "<title>medclip</title><link rel=stylesheet href=app.css><main class=login><h1>medclip viewer</h1>"
    "<p>{}</p><form action=/ method=get><label>Token <input name=token type=password autocomplete=off autofocus>"
    "</label> <button>Open</button></form></main></html>"
)


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Access:
    """An ASGI middleware.

    Args:
        app: what it guards.
        bound: the address that the server listens at.
        token: that requests must show; None for none.
        hosts: more names that the viewer goes by, e.g. of a proxy before it.
    """

    def __init__(self, app: ASGIApp, *, bound: str, token: str | None = None, hosts: Iterable[str] = ()) -> None:
        self.app, self.token = app, token
        self.elsewhere = not is_loopback(bound)
        self.hosts = {*_LOOPBACK, *(name.lower() for name in hosts)}
        if self.elsewhere:
            self.hosts |= {bound.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a WebSocket: closed without a word

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        given = self._given(scope)
        no = self._no(scope, headers, given)
        if no is not None:
            await no(scope, receive, guarded)
            return
        if given is not None and self.token is not None:
            inner = guarded

            async def guarded_with_cookie(message: Message) -> None:
                if message["type"] == "http.response.start":
                    secure = "; Secure" if scope.get("scheme") == "https" else ""
                    value = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict{secure}"
                    MutableHeaders(scope=message).append("Set-Cookie", value)
                await inner(message)

            await self.app(scope, receive, guarded_with_cookie)
            return
        await self.app(scope, receive, guarded)

    def _given(self, scope: Scope) -> str | None:
        """The token in the address of the page, and only there."""
        if scope["path"] != "/" or len(scope["query_string"]) > _MOST_QUERY:
            return None
        found = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=16).get("token")
        return found[0] if found else None

    def _no(self, scope: Scope, headers: Headers, given: str | None) -> Response | None:
        """The answer to a request that goes no further."""
        if not self._is_known(headers.getlist("host")):
            return _said(
                421, "this viewer does not go by that name: open the address that it printed, or add hosts=[NAME]"
            )
        if scope["method"] not in ("GET", "HEAD"):
            return _said(405, "this viewer can only be read: use GET")
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            return _said(413, "requests to this viewer have no body")
        if len(scope["query_string"]) > _MOST_QUERY:
            return _said(414, f"the address is longer than {_MOST_QUERY} bytes")
        if scope["path"].startswith("/api/") and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _said(403, "another site's page may not ask")
        if self.token is None or self._shown(headers, given) or scope["path"] == "/app.css":
            return None
        why = "This token is not the viewer's." if given is not None else "This viewer was started with a token."
        if scope["path"] == "/":
            return HTMLResponse(_LOGIN.format(f"{why} It stands in the address that it printed."), 401)
        return _said(401, "open the address that the viewer printed, with its token")

    def _is_known(self, hosts: list[str]) -> bool:
        if len(hosts) != 1:
            return False
        try:
            name = (urlsplit(f"//{hosts[0]}").hostname or "").rstrip(".").lower()
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.elsewhere  # an address by itself cannot be rebound

    def _shown(self, headers: Headers, given: str | None) -> bool:
        kind, _, value = headers.get("authorization", "").partition(" ")
        shown = [given, value.strip() if kind.lower() == "bearer" else None]
        try:
            jar = SimpleCookie(headers.get("cookie", ""))
            shown.append(jar[COOKIE].value if COOKIE in jar else None)
        except CookieError:
            pass
        token = (self.token or "").encode()
        # All of them, so that the time says nothing.
        return any([hmac.compare_digest(one.encode(), token) for one in shown if one is not None])


def _said(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status)
