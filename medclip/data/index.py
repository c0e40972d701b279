"""Tar indexes kept on disk, and made in parallel: the first run over a set of shards pays, later ones load.

An index is a plain .npz under a name that holds the shard's URL, size and tag, so a changed shard gets a new one.
Files are renamed into place; processes that index the same shard at once do the same work and write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from medclip.data.bad import BadSample
from medclip.data.http import public
from medclip.data.packed import Packed
from medclip.data.progress import track
from medclip.data.storage import Stat, Storage, is_local, local_path
from medclip.data.tar import TarIndex, index_tar
from medclip.types import UserError

_VERSION = 1
_REMOTE_WINDOW = 256 << 10  # a request costs about as much time as this many bytes


def default_folder() -> Path:
    """Where indexes and masks are kept: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medclip" / "index"


def index_shards(storage: Storage, urls: Sequence[str], folder: Path, *, threads: int = 8) -> list[TarIndex]:
    """The index of every shard, in the order of `urls`.

    Raises:
        UserError: a shard cannot be opened or is no tar.
    """
    with ThreadPoolExecutor(min(threads, len(urls))) as pool:
        return list(track(pool.map(lambda url: _indexed(storage, url, folder), urls), len(urls), "indexing shards"))


def _indexed(storage: Storage, url: str, folder: Path) -> TarIndex:
    stat = storage.stat(url)
    # The same file by another relative path has the same index.
    name = str(Path(local_path(url)).resolve()) if is_local(url) else url
    path = (
        folder
        / f"{hashlib.blake2b(f'{_VERSION} {name} {stat.size} {stat.tag}'.encode(), digest_size=16).hexdigest()}.npz"
    )
    if (index := _load(path, url, stat)) is not None:
        return index
    try:
        index = index_tar(
            lambda offset, length: storage.fetch(url, offset, length),
            url,
            stat.size,
            stat.tag,
            window=4096 if is_local(url) else _REMOTE_WINDOW,
        )
    except BadSample as failure:
        raise UserError(f"cannot index {public(url)}: {failure.detail}") from failure
    _save(path, index)
    return index


def _save(path: Path, index: TarIndex) -> None:
    about = {"truncated": index.truncated, "lost": index.lost, "extensions": list(index.offsets)}
    arrays = {"blob": index.keys.blob, "ends": index.keys.ends}
    for number, extension in enumerate(index.offsets):
        arrays |= {f"offsets{number}": index.offsets[extension], f"sizes{number}": index.sizes[extension]}
    save_arrays(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)


def _load(path: Path, url: str, stat: Stat) -> TarIndex | None:
    arrays = load_arrays(path)
    if arrays is None:
        return None
    about = json.loads(arrays["about"].tobytes())
    extensions = dict(enumerate(about["extensions"]))
    return TarIndex(
        url=url,
        size=stat.size,
        tag=stat.tag,
        keys=Packed(arrays["blob"], arrays["ends"]),
        offsets={extension: arrays[f"offsets{number}"] for number, extension in extensions.items()},
        sizes={extension: arrays[f"sizes{number}"] for number, extension in extensions.items()},
        truncated=about["truncated"],
        lost=tuple(about["lost"]),
    )


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz whole or not at all; a folder that cannot be written only costs the keeping."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{id(arrays)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read what `save_arrays` wrote; None if it is not there or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def digest(array: np.ndarray) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def fingerprint(parts: Iterable[object]) -> str:
    return hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=16).hexdigest()
