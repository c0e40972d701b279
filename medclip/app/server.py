"""The viewer over HTTP: what is asked is checked, handed to `Viewer` in a thread of a bounded pool, and answered.

Everything is a GET that changes nothing. Tiles and maps wait in queues of their own, so that a search never holds up a
pan; beyond the queues the answer is 503, and the page tries again.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from medclip.app.auth import Access
from medclip.app.downloads import DOWNLOADS
from medclip.app.limits import Gate, Refused
from medclip.app.maps import Wanted
from medclip.app.tiles import Tile
from medclip.app.viewer import Viewer

_log = logging.getLogger(__name__)
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    "/openseadragon.min.js": ("openseadragon/openseadragon.min.js", "text/javascript; charset=utf-8"),
    "/openseadragon.txt": ("openseadragon/LICENSE.txt", "text/plain; charset=utf-8"),
}
_KEEP = {"Cache-Control": "private, max-age=3600"}
_FRESH = {"Cache-Control": "no-store"}


def make_app(
    viewer: Viewer, *, bound: str = "127.0.0.1", token: str | None = None, hosts: Iterable[str] = ()
) -> ASGIApp:
    """The whole program, guarded.

    Args:
        viewer: answers.
        bound: the address that it will listen at.
        token: see `Access`.
        hosts: see `Access`.
    """
    limits, cores = viewer.limits, os.cpu_count() or 1
    drawing = Gate(limits.renders or cores, limits.waiting, "tiles")
    thinking = Gate(limits.maps or cores, limits.waiting, "maps")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        viewer.start()
        yield
        drawing.close()
        thinking.close()
        viewer.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _say_errors(app)
    _serve_files(app)

    def wanted(name: str, model: str, prompt: str | None, against: str | None) -> Wanted:
        texts = [" ".join(text.split()) if text else None for text in (prompt, against)]
        if any(text and len(text) > limits.prompt for text in texts):
            raise Refused(422, f"the text is too long: {limits.prompt} characters at most")
        return Wanted(name, model, texts[0] or None, texts[1] or None)

    @app.get("/api/about")
    async def about() -> Response:
        return _json(
            {"models": viewer.models(), "captions": len(viewer.captions.texts), "prompt": limits.prompt}
            | {"downloads": list(DOWNLOADS)}
        )

    @app.get("/api/slides")
    async def slides() -> Response:
        return _json(viewer.listing())

    @app.get("/api/slides/{name}")
    async def slide(name: str) -> Response:
        return _json(await drawing.run(lambda: viewer.detail(name)))

    @app.get("/api/slides/{name}/thumbnail.jpg")
    async def thumbnail(name: str) -> Response:
        return _jpeg(await drawing.run(lambda: viewer.thumbnail(name)))

    @app.get("/api/slides/{name}/tiles/{level:int}/{column:int}_{row:int}.jpg")
    async def tile(name: str, level: int, column: int, row: int) -> Response:
        found: Tile | None = viewer.ready_tile(name, level, column, row)
        if found is None:
            found = await drawing.run(lambda: viewer.tile(name, level, column, row))
        return _jpeg(found.jpeg, found.broken)

    @app.get("/api/slides/{name}/patch.jpg")
    async def patch(name: str, x: int, y: int, side: int) -> Response:
        return _jpeg(await drawing.run(lambda: viewer.patch(name, x, y, side)))

    @app.get("/api/slides/{name}/near")
    async def near(name: str, model: str, x: int, y: int) -> Response:
        found = await thinking.run(lambda: viewer.near(name, model, x, y))
        return _json({key: _plain(value) for key, value in found.items()})

    @app.get("/api/slides/{name}/map")
    async def about_map(name: str, model: str, prompt: str | None = None, against: str | None = None) -> Response:
        which = wanted(name, model, prompt, against)
        found, top = await thinking.run(lambda: (viewer.map(which).about(), viewer.top(which)))
        return _json(found | {"top": _plain(top)})

    @app.get("/api/slides/{name}/map.png")
    async def overlay(name: str, model: str, prompt: str | None = None, against: str | None = None) -> Response:
        which = wanted(name, model, prompt, against)
        png = await thinking.run(lambda: viewer.map(which).overlay())
        return Response(png, media_type="image/png", headers=_KEEP)

    @app.get("/api/slides/{name}/download")
    async def download(
        name: str, model: str, kind: str, prompt: str | None = None, against: str | None = None
    ) -> Response:
        which = wanted(name, model, prompt, against)
        if kind not in DOWNLOADS:
            raise Refused(404, f"no such file: there are {', '.join(DOWNLOADS)}")
        content = await thinking.run(lambda: viewer.file(which, kind))
        file = f"{name}_{which.title[:60]}.{kind}".replace("/", "-")
        headers = _FRESH | {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(file)}"}
        return Response(content, media_type=DOWNLOADS[kind].media, headers=headers)

    return Access(app, bound=bound, token=token, hosts=hosts)


def _serve_files(app: FastAPI) -> None:
    """The page's own files, read now: no path that is asked for is ever looked up on the disk."""
    folder = resources.files("medclip.app").joinpath("static")
    for path, (name, media) in _FILES.items():
        content = folder.joinpath(name).read_bytes()

        def file(content: bytes = content, media: str = media) -> Response:
            return Response(content, media_type=media, headers={"Cache-Control": "no-cache"})

        async def answer(request: Request, file: Callable[[], Response] = file) -> Response:
            return file()

        app.add_route(path, answer)


def _say_errors(app: FastAPI) -> None:
    """Every error as `{"error": one line}`."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse({"error": error.why}, error.status, {"Retry-After": "1"} if error.status == 503 else None)

    async def unfit(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    async def missing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(
            {"error": "there is nothing here" if error.status_code == 404 else error.detail}, error.status_code
        )

    async def own(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "an error of the viewer's own: see where it was started"}, 500)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, unfit)
    app.add_exception_handler(HTTPException, missing)
    app.add_exception_handler(Exception, own)


def _plain(value: Any) -> Any:
    """Data classes as dictionaries."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _json(content: Any) -> Response:
    return JSONResponse(content, headers=_FRESH)


def _jpeg(content: bytes, broken: int = 0) -> Response:
    return Response(content, media_type="image/jpeg", headers=_KEEP | ({"X-Broken": str(broken)} if broken else {}))
