"""Which slide a file holds, told by a little of it: features remember it, and a map is drawn over no other slide."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from slides.errors import SlideError

_PART = 1 << 20  # bytes read at either end


def identity(path: str | Path) -> str:
    """Of the file's size, its first and its last megabyte: headers and thumbnails, where any two slides differ.

    A slide of several files (MRXS, DICOM) is told by the one that it is opened by.

    Raises:
        SlideError: it cannot be read.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.blake2b(str(size).encode(), digest_size=8)
            found.update(file.read(_PART))
            file.seek(max(size - _PART, 0))
            found.update(file.read(_PART))
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror})") from None
    return found.hexdigest()
