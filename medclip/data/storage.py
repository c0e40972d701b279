"""Where bytes lie: names of shards to URLs, and ranges of bytes from any of them.

Local files are read with `pread`, http(s) and `hf://` with range requests, everything else (`s3://`, `gs://`,
`memory://`) through fsspec. Remote bytes pass a size-capped disk cache that all processes of a node share. A `Storage`
holds no open handle when it is pickled or forked.
"""

from __future__ import annotations

import glob
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
from braceexpand import braceexpand

from medclip.data.bad import BadSample
from medclip.data.cache import BlockCache
from medclip.data.http import get_range, get_size, public
from medclip.data.retry import GiveUp, TryAgain, retry
from medclip.types import UserError

_OPEN_FILES = 32


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and a tag that changes when the content does."""

    size: int
    tag: str


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    return str(Path(url.removeprefix("file://")).expanduser())


class _Descriptor:
    """A file opened to be read; closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class _Files(threading.local):
    """Open local files: a few per thread, so that no other thread closes the one being read; closed with the thread."""

    def __init__(self) -> None:
        self.open: OrderedDict[str, _Descriptor] = OrderedDict()

    def read(self, url: str, offset: int, length: int) -> bytes:
        try:
            held = self.open.get(url)
            if held is None:
                while len(self.open) >= _OPEN_FILES:
                    self.open.popitem(last=False)
                held = self.open[url] = _Descriptor(local_path(url))
            else:
                self.open.move_to_end(url)
            descriptor = held.number
            content = os.pread(descriptor, length, offset)
            while len(content) < length:  # a call reads 2 GiB at most
                more = os.pread(descriptor, length - len(content), offset + len(content))
                if not more:
                    raise GiveUp("the file ends early: it changed since it was indexed")
                content += more
            return content
        except OSError as error:
            raise GiveUp(error.strerror or "unreadable") from error


@dataclass
class Storage:
    """Reads ranges of bytes.

    Args:
        cache: disk cache for remote bytes; None reads them from the network every time.
        tries: attempts at a remote read before it counts as failed.
        backoff: seconds; attempt k is followed by a wait of up to `backoff * 2^k`, or what the server asks for.
        timeout: seconds without an answer after which an attempt has failed.
    """

    cache: BlockCache | None = None
    tries: int = 8
    backoff: float = 0.25
    timeout: float = 30.0
    _stats: dict[str, Stat] = field(default_factory=dict, repr=False)
    _files: _Files = field(default_factory=_Files, repr=False, compare=False)

    def stat(self, url: str) -> Stat:
        """Size and tag of `url`; asked once per process.

        Raises:
            UserError: it does not exist or cannot be read.
        """
        if (known := self._stats.get(url)) is not None:
            return known
        try:
            self._stats[url] = found = self._stat(url)
        except GiveUp as failure:
            raise UserError(f"cannot open {public(url)}: {failure}") from failure
        return found

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on.

        Raises:
            BadSample: "read error", after all attempts.
        """
        try:
            if is_local(url):
                return self._files.read(url, offset, length)
            if self.cache is None:
                return self._fetch(url, offset, length)
            stat = self.stat(url)
            return self.cache.read(url, stat.tag, stat.size, offset, length, self._fetch)
        except (GiveUp, UserError) as failure:
            raise BadSample("read error", f"{public(url)} at byte {offset}: {failure}") from failure

    def prefetch(self, url: str, offset: int, length: int) -> None:
        """Bring remote bytes into the cache, in one attempt; without a cache, nothing is done.

        Failures are left to `read`, which tries again while somebody waits for the result.
        """
        if self.cache is None or is_local(url):
            return
        try:
            stat = self.stat(url)
            self.cache.fill(url, stat.tag, stat.size, offset, length, self._once)
        except (GiveUp, TryAgain, UserError, OSError):
            return

    def read_all(self, url: str) -> bytes:
        """A whole (small) file, past the cache.

        Raises:
            UserError: it does not exist or cannot be read.
        """
        size = self.stat(url).size
        try:
            if is_local(url):
                return self._files.read(url, 0, size)
            return self._fetch(url, 0, size) if size else b""
        except GiveUp as failure:
            raise UserError(f"cannot read {public(url)}: {failure}") from failure

    def fetch(self, url: str, offset: int, length: int) -> bytes:
        """As `read`, past the cache: for reads so sparse that whole blocks would be waste."""
        try:
            return self._files.read(url, offset, length) if is_local(url) else self._fetch(url, offset, length)
        except GiveUp as failure:
            raise BadSample("read error", f"{public(url)} at byte {offset}: {failure}") from failure

    def _stat(self, url: str) -> Stat:
        if is_local(url):
            try:
                found = Path(local_path(url)).stat()
            except OSError as error:
                raise GiveUp(error.strerror or "unreadable") from error
            return Stat(found.st_size, str(found.st_mtime_ns))
        target = _over_http(url)
        if target is not None:
            return Stat(*self._retry(lambda: get_size(target, self.timeout)))
        return self._retry(lambda: _remote(url, _info))

    def _fetch(self, url: str, offset: int, length: int) -> bytes:
        return self._retry(lambda: self._once(url, offset, length))

    def _once(self, url: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        target = _over_http(url)
        if target is not None:
            return get_range(target, offset, length, self.timeout)

        def attempt(fs: Any, path: str) -> bytes:
            body = fs.cat_file(path, start=offset, end=offset + length)
            if len(body) != length:
                raise TryAgain(f"short answer: {len(body)} of {length} bytes")
            return body

        return _remote(url, attempt)

    def _retry(self, attempt: Callable[[], Any]) -> Any:
        return retry(attempt, tries=self.tries, backoff=self.backoff)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.cache, self.tries, self.backoff, self.timeout, self._stats)


def expand(urls: str | Sequence[str]) -> list[str]:
    """Shard URLs that a config's `urls` stands for, in order.

    Takes one string or a list; each may join several by `::`, hold brace ranges (`{00000..00099}`), a glob, or name a
    folder (all its `.tar` files).

    Raises:
        UserError: something in it matches no file.
    """
    given = [urls] if isinstance(urls, str) else list(urls)
    found: list[str] = []
    for text in given:
        for part in str(text).split("::"):
            if part.startswith("pipe:"):
                raise UserError(f"{part[:40]!r} is a pipe, which cannot be read at random: give its URL (s3://…)")
            try:
                names = list(braceexpand(part))
            except ValueError as error:
                raise UserError(
                    f"bad brace range in {public(part)} ({error}): write e.g. shards/{{00000..00099}}.tar"
                ) from error
            for name in names:
                matches = _match(name)
                if not matches:
                    raise UserError(f"no shard matches {public(name)}: check the path (relative to {Path.cwd()})")
                found += matches
    if not found:
        raise UserError("no shard matches: `urls` is empty")
    return found


def _match(name: str) -> list[str]:
    if is_local(name):
        path = local_path(name)
        if Path(path).is_dir():
            return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))  # noqa: PTH118, PTH207
        if Path(path).is_file():  # before globbing: names may hold brackets
            return [path]
        return sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())  # noqa: PTH207
    if not glob.has_magic(name.split("?")[0] if name.startswith("http") else name):
        return [name]
    if name.startswith(("http://", "https://")):
        raise UserError(
            f"{public(name)}: https has no listing to match `*` against; write a brace range {{00000..00099}}"
        )
    try:
        return _remote(name, lambda fs, path: sorted(fs.unstrip_protocol(p) for p in fs.glob(path)))
    except (GiveUp, TryAgain) as failure:
        raise UserError(f"cannot list {public(name)}: {failure}") from failure


def _over_http(url: str) -> str | None:
    """The http(s) address of `url` if it has one; `hf://` files are plain https with a token."""
    if url.startswith(("http://", "https://")):
        return url
    if not url.startswith("hf://"):
        return None
    pieces = url.removeprefix("hf://").split("/")
    kind = pieces.pop(0) + "/" if pieces[0] in ("datasets", "spaces") else ""
    if len(pieces) < 3:
        raise GiveUp("write hf://datasets/OWNER/NAME[@REVISION]/PATH")
    name, _, revision = pieces[1].partition("@")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    path = quote("/".join(pieces[2:]))
    return f"{endpoint}/{kind}{pieces[0]}/{name}/resolve/{revision or 'main'}/{path}"


def _remote(url: str, use: Callable[[Any, str], Any]) -> Any:
    """`use(filesystem, path)` with fsspec's failures sorted into those that may pass and those that will not."""
    try:
        # Looked up each time: fsspec keeps instances per process and renews them after a fork.
        fs, path = fsspec.core.url_to_fs(url)
        return use(fs, path)
    except ImportError as error:
        raise UserError(
            f"reading {public(url)} needs a package more: pip install 'medclip-adapt[cloud]' ({error})"
        ) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise GiveUp(f"{type(error).__name__}") from error
    except (TryAgain, GiveUp):
        raise
    except Exception as error:  # each backend has exceptions of its own
        # An unknown protocol and missing credentials do not heal with time.
        kind = type(error).__name__
        if isinstance(error, ValueError) or "Credential" in kind or "Auth" in kind:
            raise GiveUp(f"{kind}: {str(error)[:120]}") from error
        raise TryAgain(f"{kind}") from error


def _info(fs: Any, path: str) -> Stat:
    info = fs.info(path)
    tag = next((info[k] for k in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if info.get(k)), "")
    return Stat(int(info["size"]), str(tag))
