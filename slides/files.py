"""Files that are there whole or not at all, and folders that only one run writes to."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slides.errors import SlideError


class OutputError(SlideError):
    """Nothing more can be written: the run ends, what was written stays, the same command goes on from there."""


class Busy(SlideError):
    """Another run is at work on the same slide."""


@contextmanager
def written(what: Path) -> Iterator[None]:
    """Turn an error of the operating system while writing into one line with the remedy."""
    try:
        yield
    except OSError as error:
        name = error.filename or what
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room and give the same command again: it goes on where it stopped"
        else:
            remedy = "choose another output folder"
        # HDF5 puts a page of its own where others have a few words.
        why = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        raise OutputError(f"cannot write {name} ({why}): {remedy}") from error


def write_whole(path: Path, content: bytes | Iterable[bytes], *, durable: bool = True) -> None:
    """Write beside, flush to disk, rename: a killed run leaves the old file or none, never half of the new.

    Args:
        path: of the file; its folder is made.
        content: of it.
        durable: wait for the disk, so that a power cut cannot undo it either.

    Raises:
        OutputError: it cannot be written; nothing is left of it.
    """
    part = _part(path)
    with written(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _part(path: Path) -> Path:
    """A name beside it that no other process has, on whichever machine: in containers process ids are much alike."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when all went well, for libraries that want a file of their own.

    Raises:
        OutputError: it cannot be written.
    """
    part = _part(path)
    with written(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a lock that dies with the process, so that a kill leaves nothing to clear.

    Raises:
        Busy: another process holds it.
        OutputError: it cannot be written.
    """
    with written(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            raise Busy(f"{lock.stem} is being written by another run ({holder or 'unknown'}): left to it") from None
        with suppress(OSError):  # who holds it is a courtesy
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        yield
    finally:
        os.close(handle)


def sweep(folders: Iterable[Path], name: str) -> None:
    """Remove what killed processes left half-written of a slide in some folders. Its lock is held by the caller."""
    mine = re.compile(
        rf"\.{re.escape(name)}(-\d+\.tar|(_patches)?\.h5|\.(json|parquet|csv|geojson|jpg|png|tiff|pt|zarr))"
        r"(\.[\w-]+)?\.part"
    )
    for folder in dict.fromkeys(folders):
        for part in folder.glob(".*.part"):
            if mine.fullmatch(part.name):
                _remove(part)


def sweep_old(folder: Path, names: Iterable[str], seconds: float = 600) -> None:
    """Remove half-written tables, which all runs write, without a lock: those so old that nobody is at it any more."""
    for part in (part for name in names for part in folder.glob(f".{name}.*.part")):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > seconds:
                part.unlink()


def _remove(part: Path) -> None:
    with written(part):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
