"""An index of a tar of samples: where each member of each sample lies, from one pass over the headers.

With it a shard is random access, which is what exact resume, free sharding and weighted mixing rest on. Only headers
are read, so a local shard is indexed at thousands of samples a second, and a remote one without its big members.

Reads ustar, GNU long names and PAX (path, size). A name is split into key and extension at its last dot, unlike
webdataset, which splits at the first and so breaks keys such as BIOMEDICA's `3-PMC1.2-0-fig.1`. Folder parts belong to
the key. Members of one sample need not stand together; a member that comes again begins another sample of that key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from medclip.data.http import public
from medclip.data.packed import Packed
from medclip.types import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "dcm", "dicom")
# Two-part extensions are those of DataCompDR (MobileCLIP's reinforced shards).
_COMPOUND = ("syn.json", "paug.json", "pth.gz")
KNOWN = frozenset(
    (
        *IMAGES,
        "txt",
        "caption",
        "json",
        "cls",
        "npy",
        "npz",
        "pth",
        "pt",
        "pyd",
        "cbor",
        "mask",
        "seg",
        "bin",
        *_COMPOUND,
    )
)
_BLOCK = 512
_MAX_NAME = 1 << 20  # bytes of a long-name or PAX record; more is a broken header
_PACKED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\3\4", "zip"),
)
Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class TarIndex:
    """Samples of one tar. `offsets[ext][i]` is -1 where sample i has no such member."""

    url: str
    size: int  # bytes of the tar
    tag: str  # changes with its content
    keys: Packed
    offsets: dict[str, np.ndarray]  # extension -> int64 (n,)
    sizes: dict[str, np.ndarray]  # extension -> int64 (n,)
    truncated: bool = False
    lost: tuple[str, ...] = ()  # keys of samples left out because the cut goes through them

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class _Window:
    """Reads a little more than asked, since the next header is often near."""

    read: Read
    size: int
    width: int
    start: int = 0
    content: bytes = b""

    def __call__(self, offset: int, length: int) -> bytes:
        first = offset - self.start
        if first < 0 or first + length > len(self.content):
            self.content = self.read(offset, min(max(length, self.width), self.size - offset))
            self.start, first = offset, 0
        return self.content[first : first + length]


class _Cut(Exception):
    """The archive stops before its end mark: within member `name`, within a header, or after a whole member."""

    def __init__(self, name: str | None = None, *, whole: bool = False) -> None:
        super().__init__(name)
        self.name = name
        self.whole = whole


def index_tar(read: Read, url: str, size: int, tag: str = "", *, window: int = 4096) -> TarIndex:
    """Index a tar of `size` bytes.

    Args:
        read: (offset, length) -> that many bytes.
        url: kept in the index, and named in errors.
        window: bytes read at a time; larger where a request costs more than its bytes.

    Raises:
        UserError: it is no tar at all.
    """
    table = _Table()
    truncated = False
    try:
        for name, offset, length in _members(_Window(read, size, window), size, url):
            if (split := split_name(name)) is not None:
                table.add(*split, offset, length)
    except _Cut as cut:
        table.cut(split_name(cut.name) if cut.name else None)
        # Some writers leave out the end mark, so that alone is no damage unless the last sample lacks something.
        truncated = not cut.whole or bool(table.lost) or size == 0
    keys, offsets, sizes = table.arrays()
    return TarIndex(url, size, tag, keys, offsets, sizes, truncated, tuple(table.lost))


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member, or None for what is no part of a sample."""
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    if not base or base.startswith(".") or name.startswith("__MACOSX/") or "/__MACOSX/" in name:
        return None
    stem, dot, extension = base.rpartition(".")
    extension = extension.lower()
    for compound in _COMPOUND:
        if base.lower().endswith("." + compound):
            stem, extension = base[: -len(compound) - 1], compound
    if not dot or not stem or extension not in KNOWN:
        return None
    return folder + slash + stem, extension


@dataclass
class _Table:
    """Members gathered to samples."""

    keys: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    columns: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    last: str | None = None

    def add(self, key: str, extension: str, offset: int, length: int) -> None:
        column = self.columns.setdefault(extension, {})
        row = self.rows.get(key)
        if row is None or row in column:
            row = self.rows[key] = len(self.keys)
            self.keys.append(key)
        column[row] = (offset, length)
        self.last = key

    def cut(self, member: tuple[str, str] | None) -> None:
        """Drop the sample that the cut goes through: the cut member's, or the last one if it lacks what others have."""
        key = member[0] if member else self.last
        if key is None:
            return
        row = self.rows.get(key)
        if member is None and (row in (None, 0) or self._extensions(row) >= self._extensions(row - 1)):
            return
        self.lost.append(key)
        if row is not None:
            for column in self.columns.values():
                column.pop(row, None)

    def _extensions(self, row: int) -> set[str]:
        return {extension for extension, column in self.columns.items() if row in column}

    def arrays(self) -> tuple[Packed, dict[str, np.ndarray], dict[str, np.ndarray]]:
        places = {}
        for extension, column in self.columns.items():
            place = np.full((2, len(self.keys)), -1, dtype=np.int64)
            place[:, list(column)] = np.array(list(column.values()), dtype=np.int64).reshape(-1, 2).T
            places[extension] = place
        used = np.zeros(len(self.keys), dtype=bool)
        for place in places.values():
            used |= place[0] >= 0
        keys = Packed.of(key for key, keep in zip(self.keys, used, strict=True) if keep)
        return (
            keys,
            {extension: place[0, used] for extension, place in places.items()},
            {extension: place[1, used] for extension, place in places.items()},
        )


def _members(read: _Window, size: int, url: str) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, length) of every regular file.

    Raises:
        _Cut: the archive ends before it should.
    """
    position = 0
    extra: dict[str, str] = {}  # what a long-name or PAX header says of the member that follows
    while position < size:
        header = read(position, min(_BLOCK, size - position))
        if len(header) == _BLOCK and not any(header):
            return
        if len(header) < _BLOCK or not _sound(header):
            if position == 0 and (packed := _packed(header)):
                raise UserError(
                    f"{public(url)} is compressed ({packed}), which has no random access: unpack it to a plain .tar"
                )
            if position == 0 and len(header) == _BLOCK:
                raise UserError(f"{public(url)} is not a tar file: check it, or download it again")
            raise _Cut
        kind = header[156:157]
        length = _number(header[124:136])
        data = position + _BLOCK
        if kind in b"LKxg":
            if not 0 <= length <= _MAX_NAME or data + length > size:
                raise _Cut
            if kind == b"L":
                extra["path"] = read(data, length).split(b"\0", 1)[0].decode("utf-8", "replace")
            elif kind == b"x":
                extra.update(_pax(read(data, length)))
        else:
            name = extra.get("path") or _name(header)
            if "size" in extra:
                length = int(extra["size"])
            regular = kind in (b"\0", b"0", b"7") and not name.endswith("/")
            if kind in b"123456":
                length = 0  # links, devices and folders have no content, whatever their size field says
            if length < 0 or data + length > size:
                raise _Cut(name)
            if regular:
                yield name, data, length
            extra = {}
        position = data + -(-length // _BLOCK) * _BLOCK
    raise _Cut(whole=True)


def _packed(header: bytes) -> str | None:
    return next((name for magic, name in _PACKED if header.startswith(magic)), None)


def _sound(header: bytes) -> bool:
    """Whether the header's checksum holds; a few old writers summed signed bytes."""
    told = _number(header[148:156])
    total = sum(header[:148]) + 256 + sum(header[156:])
    return told == total or told == int(
        np.frombuffer(header[:148] + b" " * 8 + header[156:], np.int8).sum(dtype=np.int64)
    )


def _number(raw: bytes) -> int:
    """A numeric field: octal digits, or base 256 where the first bit is set; -1 if it is neither."""
    if raw[0] & 0x80:
        return int.from_bytes(raw, "big") & ((1 << (8 * len(raw) - 1)) - 1)
    digits = raw.split(b"\0", 1)[0].strip()
    # Checked here, since `int` takes signs and underscores too: a negative length would lead back into the archive.
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else -1


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU's older format ("ustar  ") keeps other things in the prefix field
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "replace")


def _pax(records: bytes) -> dict[str, str]:
    """`path` and `size` of a PAX header, whose records are "LENGTH KEY=VALUE\\n"."""
    found = {}
    position = 0
    while position < len(records):
        digits = records[position : position + 20].split(b" ", 1)[0]
        if not digits.isdigit() or int(digits) <= len(digits):
            break
        record = records[position + len(digits) + 1 : position + int(digits) - 1]
        key, _, value = record.partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit() and len(value) < 20):
            found[key.decode()] = value.decode("utf-8", "replace")
        position += int(digits)
    return found
