"""A folder of images as a source: class folders for labels, a `.txt` of the same stem for captions."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.index import digest, fingerprint
from medclip.data.inside import read_inside
from medclip.data.packed import Packed
from medclip.data.raw import RawSample
from medclip.data.tar import IMAGES
from medclip.types import UserError


@dataclass(frozen=True)
class FolderSource:
    """Images below `root`; the metadata is `image` (the path) and `label` (the first folder below `root`).

    Args:
        name: in messages and reports.
        root: absolute folder, links resolved.
        paths: image files relative to `root`.
        texts: bool, whether the image has a caption file.
        rows: int64, numbers of the images that are in.
        caption: how captions are made.
        weight: passes per epoch.
        problems: (key, reason, detail) of images left out.
    """

    name: str
    root: str
    paths: Packed
    texts: np.ndarray
    rows: np.ndarray
    caption: CaptionRule = field(default_factory=CaptionRule)
    weight: float = 1.0
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def chunks(self) -> np.ndarray:
        return np.arange(len(self.rows), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        return _stem(self.paths[int(self.rows[i])])

    def read(self, i: int, *, want_meta: bool = False) -> RawSample:
        path = self.paths[int(self.rows[i])]
        return RawSample(_stem(path), read_inside(self.root, path), self._text(i), _meta(path))

    def fields(self, i: int) -> dict[str, Any]:
        path = self.paths[int(self.rows[i])]
        return {"key": _stem(path), "caption": self._text(i), **_meta(path)}

    def extents(self, i: int) -> tuple[str, int, int] | None:
        return None

    def select(self, rows: np.ndarray) -> FolderSource:
        return replace(self, rows=self.rows[rows])

    def fingerprint(self) -> str:
        return fingerprint([self.root, digest(self.paths.blob), digest(self.rows)])

    def _text(self, i: int) -> str | None:
        row = int(self.rows[i])
        if not self.texts[row]:
            return None
        try:
            return read_inside(self.root, _stem(self.paths[row]) + ".txt").decode("utf-8-sig", "replace")
        except BadSample as failure:
            raise BadSample("missing caption", failure.detail) from None


def open_folder(name: str, path: str, caption: CaptionRule, weight: float = 1.0) -> FolderSource:
    """The images below a folder, sorted by path.

    Raises:
        UserError: no such folder, no image in it, or no captions where they are needed.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"source {name}: folder {path} is not there: check the path (relative to {Path.cwd()})")
    problems: list[tuple[str, str, str]] = []
    paths: list[str] = []
    texts: list[bool] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        there = set(files)
        for file in sorted(files):
            stem, _, ending = file.rpartition(".")
            if not stem or file.startswith(".") or ending.lower() not in IMAGES:
                continue
            image = (Path(folder) / file).relative_to(root).as_posix()
            if caption.needs_text and f"{stem}.txt" not in there:
                problems.append((_stem(image), "missing caption", f"no {_stem(image)}.txt"))
            else:
                paths.append(image)
                texts.append(f"{stem}.txt" in there)
    if not paths:
        why = f"none of its {len(problems)} images has a .txt caption: set caption=false if none is needed"
        raise UserError(f"source {name}: folder {path}: {why if problems else 'no image below it'}")
    rows = np.arange(len(paths))
    return FolderSource(
        name, os.path.realpath(root), Packed.of(paths), np.array(texts), rows, caption, weight, problems
    )


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _meta(path: str) -> dict[str, Any]:
    folder, slash, _ = path.partition("/")
    return {"image": path, "label": folder if slash else None}
