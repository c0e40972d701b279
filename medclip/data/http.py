"""Byte ranges over http(s): one session per thread and process, strict about what comes back.

A server under load answers a range request in many wrong ways: 429, 503, a reset, a body that ends early, or the whole
file with status 200. All of these are tried again; only bytes that the answer's `Content-Range` vouches for are taken.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import requests

from medclip.data.retry import GiveUp, TryAgain

_PASSING = {408, 425, 429, 500, 502, 503, 504}
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_RESOLVED_FOR = 300.0  # seconds that a redirect's target is used directly; signed URLs live longer
_state = threading.local()


def public(url: str) -> str:
    """`url` fit for messages: signatures and passwords live in what is cut away."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def get_range(url: str, offset: int, length: int, timeout: float) -> bytes:
    """Bytes `offset .. offset + length` of `url`; one attempt.

    Raises:
        TryAgain: a failure that may pass.
        GiveUp: one that will not (404, 401, …).
    """
    body, first, _, _ = _request(url, offset, length, timeout)
    if first != offset or len(body) != length:
        raise TryAgain(f"short answer: {len(body)} of {length} bytes")
    return body


def get_size(url: str, timeout: float) -> tuple[int, str]:
    """Size in bytes, and a tag that changes with the content (ETag or Last-Modified).

    Asks for one byte instead of HEAD: signed URLs and some object stores refuse HEAD, and this shows that ranges work.
    """
    _, _, total, tag = _request(url, 0, 1, timeout)
    return total, tag


def _request(url: str, offset: int, length: int, timeout: float) -> tuple[bytes, int, int, str]:
    """Body, first byte, total size and tag."""
    session, resolved = _session()
    target, until = resolved.get(url, (url, 0.0))
    if time.monotonic() > until:
        target = url
    headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
    if target == url and (token := os.environ.get("HF_TOKEN")) and _is_hub(url):
        headers["Authorization"] = f"Bearer {token}"
    try:
        with session.get(target, headers=headers, timeout=timeout, stream=True) as answer:
            if answer.status_code == 206:
                found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
                if found is None or found[3] == "*":
                    raise TryAgain(f"answer without a usable Content-Range ({answer.headers.get('Content-Range')!r})")
                body = answer.content
                if answer.history:
                    resolved[url] = (answer.url, time.monotonic() + _RESOLVED_FOR)
                tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
                return body, int(found[1]), int(found[3]), tag
            if answer.status_code == 416 and answer.headers.get("Content-Range", "").endswith("/0"):
                return b"", 0, 0, answer.headers.get("ETag", "")
            if target != url:
                resolved.pop(url, None)
                raise TryAgain(f"HTTP {answer.status_code} from a redirect's target")
            raise _failure(answer)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        resolved.pop(url, None)
        raise TryAgain(f"connection failed ({type(error).__name__})") from error
    except requests.RequestException as error:
        raise GiveUp(f"request failed ({type(error).__name__})") from error


def _failure(answer: requests.Response) -> Exception:
    status = answer.status_code
    if status == 200:
        return TryAgain("the server ignores range requests (HTTP 200): download the shards instead")
    if status in _PASSING:
        return TryAgain(f"HTTP {status}", _retry_after(answer.headers.get("Retry-After")))
    if status in (401, 403) and _is_hub(answer.url):
        return GiveUp(f"HTTP {status}: set HF_TOKEN to a token that may read this gated repository")
    return GiveUp(f"HTTP {status}")


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds a number or a date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _is_hub(url: str) -> bool:
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    parts = urlsplit(url)
    return (parts.scheme, parts.netloc) == (endpoint.scheme, endpoint.netloc)


def _session() -> tuple[requests.Session, dict[str, tuple[str, float]]]:
    """This thread's session; a forked child makes its own, since two processes on one socket mix up their answers."""
    if getattr(_state, "pid", None) != os.getpid():
        _state.pid, _state.session, _state.resolved = os.getpid(), requests.Session(), {}
    return _state.session, _state.resolved
