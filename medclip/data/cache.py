"""A size-capped disk cache of fixed blocks, shared by all workers and ranks of a node.

Blocks are whole files, written under another name and renamed, so a killed process leaves nothing half-written that
anyone would read. Locks are `flock`s, which the kernel drops with their process. The size is kept below the cap by
reserving a block's bytes in a counter before it is written; when the counter passes the cap, the folder is measured and
the blocks used longest ago go.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

Fetch = Callable[[str, int, int], bytes]
_ABANDONED = 600.0  # seconds after which a part-written block belongs to nobody


def default_folder() -> Path:
    """One folder per user under the system's temporary folder, so that users of a node do not meet."""
    return Path(tempfile.gettempdir()) / f"medclip-cache-{os.getuid()}"


@dataclass(frozen=True)
class BlockCache:
    """Caches remote files block by block.

    Args:
        folder: where blocks lie; made if missing.
        max_gb: cap on the folder's size, in 10^9 bytes.
        block: bytes of a block.
    """

    folder: Path
    max_gb: float = 20.0
    block: int = 4 << 20

    def __post_init__(self) -> None:
        # For the user alone: what a token opened is not for everyone on the node.
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.folder / "locks").mkdir(exist_ok=True)

    def read(self, url: str, tag: str, size: int, offset: int, length: int, fetch: Fetch) -> bytes:
        """Bytes `offset .. offset + length` of `url`, whose content is known by `tag` and has `size` bytes."""
        pieces = []
        end = offset + length
        for number in range(offset // self.block, -(-end // self.block)):
            start = number * self.block
            first, last = max(offset - start, 0), min(end - start, self.block)
            pieces.append(self._piece(url, tag, size, number, first, last, fetch))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def fill(self, url: str, tag: str, size: int, offset: int, length: int, fetch: Fetch) -> None:
        """See that the blocks of a range are here."""
        for number in range(offset // self.block, -(-(offset + length) // self.block)):
            if not self._path(url, tag, number).exists():
                self._piece(url, tag, size, number, 0, 0, fetch)

    def _piece(self, url: str, tag: str, size: int, number: int, first: int, last: int, fetch: Fetch) -> bytes:
        path = self._path(url, tag, number)
        whole = min(self.block, size - number * self.block)
        if (piece := _read(path, whole, first, last)) is not None:
            return piece
        with ExitStack() as held:
            with suppress(OSError):  # a full or read-only disk costs only the caching
                held.enter_context(self._lock(path.name[:2]))
            if (piece := _read(path, whole, first, last)) is not None:
                return piece  # whoever comes second finds the block here
            content = fetch(url, number * self.block, whole)
            self._write(path, content)
        return content[first:last]

    def _path(self, url: str, tag: str, number: int) -> Path:
        name = hashlib.blake2b(f"{url}\n{tag}\n{self.block}\n{number}".encode(), digest_size=20).hexdigest()
        return self.folder / name[:2] / name

    def _write(self, path: Path, content: bytes) -> None:
        """Keep a block if there is room and the disk allows it."""
        if len(content) > int(self.max_gb * 1e9):
            return
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            self._reserve(len(content))
            path.parent.mkdir(exist_ok=True)
            part.write_bytes(content)
            part.replace(path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _reserve(self, count: int) -> None:
        cap = int(self.max_gb * 1e9)
        counter = self.folder / "locks" / "bytes"
        with self._lock("evict"):
            try:
                total = int(counter.read_text())
            except (OSError, ValueError):  # first use, or killed while writing it: the folder is measured
                total = cap
            if total + count > cap:
                total = self._evict(max(0, int(cap * 0.9) - count))
            counter.write_text(str(total + count))

    def _evict(self, keep: int) -> int:
        """Remove the blocks used longest ago until at most `keep` bytes remain; returns what remains."""
        blocks = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix == ".part" and time.time() - found.st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
            else:
                blocks.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if total <= keep:
                break
            if path.suffix != ".part":
                path.unlink(missing_ok=True)
                total -= size
        return total

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """One of 256 lock files for blocks: two that share one only wait for each other."""
        # Opened anew each time: a lock belongs to the open file, so it holds between threads too.
        with (self.folder / "locks" / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _read(path: Path, whole: int, first: int, last: int) -> bytes | None:
    """Part of a block, or None if it is not here in its full length (a crashed disk may leave empty files)."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != whole:
                return None
            with suppress(OSError):
                os.utime(file.fileno())  # used now: what eviction goes by
            return os.pread(file.fileno(), last - first, first)
    except OSError:
        return None
