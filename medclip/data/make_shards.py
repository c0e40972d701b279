"""Any source written as shards in BIOMEDICA's layout: `KEY.jpg` (or its own format), `KEY.txt`, `KEY.json`.

Image files are passed through unchanged. Shards are written in parallel, each under another name and then renamed; the
manifest `shards.jsonl` gets a line when one is done, so a killed run goes on where it was. The result is the same to
the byte however often it was interrupted. `sizes.json` is open_clip's.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from medclip.data.bad import BadSample
from medclip.data.decode import read_image
from medclip.data.index import fingerprint
from medclip.data.progress import track
from medclip.data.raw import RawSample, Source
from medclip.data.tar import split_name
from medclip.types import Preprocess, UserError

_MANIFEST = "shards.jsonl"
_GLANCE = Preprocess(size=(32, 32))  # small: a JPEG is decoded at 1/8, which still runs over every byte of it
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


@dataclass(frozen=True)
class Written:
    """What came of it."""

    shards: int
    samples: int
    skipped: int


def make_shards(
    source: Source,
    out: str | Path,
    *,
    samples_per_shard: int = 10_000,
    processes: int = 1,
    max_pixels: int = 89_000_000,
) -> Written:
    """Write `source` to `out/00000.tar …` with `shards.jsonl`, `sizes.json` and `skipped.jsonl`.

    Args:
        source: what to write; its caption rule says what goes into `.txt` (the first of its texts).
        out: folder; may hold part of the same set, which is then completed.
        samples_per_shard: samples of the source that go into a shard, before unusable ones are left out.
        processes: shards written at a time.
        max_pixels: larger images are skipped.

    Raises:
        UserError: `out` holds something else or cannot be written, or no sample was usable.
    """
    if samples_per_shard < 1 or processes < 1:
        raise UserError(f"samples per shard ({samples_per_shard}) and processes ({processes}) must be at least 1")
    folder = Path(out).expanduser()
    mark = fingerprint([source.fingerprint(), source.caption, samples_per_shard, max_pixels])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = _finished(folder, mark)
        work = [
            _Work(folder / f"{number:05d}.tar", first, min(first + samples_per_shard, len(source)), max_pixels)
            for number, first in enumerate(range(0, len(source), samples_per_shard))
        ]
        todo = [item for item in work if item.path.name not in done]
        with (folder / _MANIFEST).open("ab") as manifest:
            for line in track(_run(source, todo, processes), len(todo), f"writing {folder}"):
                done[line["shard"]] = line
                manifest.write(orjson.dumps({"set": mark} | line) + b"\n")
                manifest.flush()
                os.fsync(manifest.fileno())
        lines = [done[item.path.name] for item in work]
        skipped = [{"key": k, "reason": reason, "detail": detail} for k, reason, detail in source.problems]
        skipped += [item for line in lines for item in line["skipped"]]
        _write(folder / _MANIFEST, b"".join(orjson.dumps({"set": mark} | line) + b"\n" for line in lines))
        _write(folder / "skipped.jsonl", b"".join(orjson.dumps(item) + b"\n" for item in skipped))
        _write(folder / "sizes.json", json.dumps({line["shard"]: line["samples"] for line in lines}, indent=0).encode())
    except OSError as error:
        raise UserError(f"cannot write shards to {folder} ({error.strerror}): choose another folder") from error
    samples = sum(line["samples"] for line in lines)
    if not samples:
        raise UserError(f"no sample of {source.name} is usable, e.g. {skipped[0]}: see {folder / 'skipped.jsonl'}")
    return Written(len(lines), samples, len(skipped))


@dataclass(frozen=True)
class _Work:
    path: Path
    first: int
    last: int
    max_pixels: int


def _finished(folder: Path, mark: str) -> dict[str, dict[str, Any]]:
    """Manifest lines of the shards that are whole; anything that is not this set's is left alone and refused."""
    lines: dict[str, dict[str, Any]] = {}
    manifest = folder / _MANIFEST
    for raw in manifest.read_bytes().splitlines() if manifest.exists() else []:
        try:
            line = orjson.loads(raw)
        except orjson.JSONDecodeError:
            continue  # cut by a kill
        if not isinstance(line, dict) or line.pop("set", None) != mark:
            raise UserError(f"{folder} holds another set of shards: choose another folder, or remove it")
        lines[line["shard"]] = line
    ours = ("*.tar", "sizes.json", "skipped.jsonl")
    if not manifest.exists() and (other := sorted(path for name in ours for path in folder.glob(name))):
        raise UserError(f"{folder} holds files that were not written here ({other[0].name}…): choose another folder")
    for part in folder.glob("*.tar.part"):
        part.unlink()
    whole = {}
    for name, line in lines.items():
        path = folder / name
        if path.exists() and path.stat().st_size == line["bytes"]:
            whole[name] = line
    return whole


def _run(source: Source, todo: list[_Work], processes: int) -> Iterator[dict[str, Any]]:
    if processes == 1 or len(todo) < 2:
        for item in todo:
            yield _write_shard(source, item)
        return
    # Spawned, not forked: the parent may have threads of storage or torch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(todo)), context, _keep_source, (source,)) as pool:
        yield from pool.map(_write_mine, todo)


_mine: list[Source] = []  # the source of a worker process, sent once


def _keep_source(source: Source) -> None:
    torch.set_num_threads(1)  # the processes are the parallelism
    _mine[:] = [source]


def _write_mine(item: _Work) -> dict[str, Any]:
    return _write_shard(_mine[0], item)


def _write_shard(source: Source, item: _Work) -> dict[str, Any]:
    """Write one shard and return its manifest line."""
    part = item.path.with_name(item.path.name + ".part")
    skipped: list[dict[str, str]] = []
    samples = 0
    with part.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for i in range(item.first, item.last):
                try:
                    members = list(_members(source, source.read(i, want_meta=True), item.max_pixels))
                except BadSample as failure:
                    skipped.append({"key": source.key(i), "reason": failure.reason, "detail": failure.detail})
                    continue
                _add(tar, member_key(source.key(i)), members)
                samples += 1
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    part.replace(item.path)
    return {"shard": item.path.name, "samples": samples, "bytes": size, "skipped": skipped}


def _members(source: Source, raw: RawSample, max_pixels: int) -> Iterator[tuple[str, bytes]]:
    read_image(raw.image, _GLANCE, max_pixels=max_pixels)  # raises on what training would skip
    yield image_extension(raw.image), raw.image
    if source.caption.wanted:
        texts = source.caption.all(raw)
        if not texts:
            raise BadSample("empty caption", f"nothing in {', '.join(source.caption.fields)}")
        yield "txt", texts[0].encode()
    yield "json", _json(raw.meta or {})


def _json(meta: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(meta)
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(meta, ensure_ascii=False).encode()


def _add(tar: tarfile.TarFile, key: str, members: Iterable[tuple[str, bytes]]) -> None:
    for extension, content in members:
        info = tarfile.TarInfo(f"{key}.{extension}")  # owner and times stay zero: the same bytes every time
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def image_extension(data: bytes) -> str:
    """The format of an image file, by its first bytes.

    Raises:
        BadSample: none that shards hold.
    """
    for magic, extension in _MAGIC:
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadSample("broken image", f"unknown format, begins with {data[:8]!r}")


def member_key(key: str) -> str:
    """`key` as a member name that stays below the folder a tar is unpacked in and that readers do not pass over."""
    parts = [part for part in key.replace("\0", "_").replace("\\", "_").split("/") if part not in ("", ".")]
    name = "/".join(f"_{part}" if part.startswith((".", "__MACOSX")) else part for part in parts) or "_"
    return (
        f"{name}_" if split_name(f"{name}.json") != (name, "json") else name
    )  # KEY.syn + .json reads as KEY + .syn.json


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
