"""Files below a folder, by names that are not trusted: nothing outside is read, whatever `..` and links say."""

from __future__ import annotations

import os
import stat

from medclip.data.bad import BadSample


def is_inside(root: str, name: str) -> bool:
    """Whether there is a file `name` below `root` (an absolute path with links resolved)."""
    try:
        path = os.path.realpath(os.path.join(root, name))  # noqa: PTH118  # an absolute name replaces root
        return os.path.commonpath([root, path]) == root and os.path.isfile(path)  # noqa: PTH113
    except ValueError:  # a NUL in the name
        return False


def read_inside(root: str, name: str) -> bytes:
    """Content of the regular file `name` below `root` (an absolute path with links resolved).

    Raises:
        BadSample: it is missing, unreadable, or not inside `root`.
    """
    try:
        path = os.path.realpath(os.path.join(root, name))  # noqa: PTH118  # an absolute name replaces root, and fails below
        if os.path.commonpath([root, path]) != root:
            raise BadSample("unsafe path", f"{name} leads out of {root}: set image_root to a folder that holds it")
        # Without waiting for a writer, should it be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BadSample("missing image", f"{name} is no regular file")
    except FileNotFoundError:
        raise BadSample("missing image", f"{name} is not in {root}") from None
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        raise BadSample("read error", f"{name}: {error}") from None
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read()
        except OSError as error:
            raise BadSample("read error", f"{name}: {error}") from None
