"""Members against tarfile and, where it is there, the system's tar."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slides.tar import END, member

NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0/"), min_size=1, max_size=150)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=1300)), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
def test_tarfile_reads_what_was_written(pairs: list[tuple[str, bytes]]) -> None:
    raw = b"".join(member(name, content) for name, content in pairs) + END
    assert len(raw) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        found = [(info.name, info.mode, info.mtime, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    # tarfile takes a slash at the end for a folder's; a name cannot hold one here.
    assert [(name, content) for name, _, _, content in found] == pairs
    assert {(mode, mtime) for _, mode, mtime, _ in found} == {(0o644, 0)}


def test_the_same_members_are_the_same_bytes() -> None:
    for name in ("a.jpg", "ü.jpg", "x" * 200):
        assert member(name, b"abc") == member(name, b"abc")
    assert len(member("x" * 100, b"")) == 512 < len(member("x" * 101, b""))  # PAX only where it must be


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar on this machine")
def test_the_system_s_tar_unpacks_it(tmp_path: Path) -> None:
    names = ["plain.json", "x" * 160 + ".jpg", "Fall 7 – Übersicht 胃 (2)_0_0.jpg"]
    (tmp_path / "s.tar").write_bytes(b"".join(member(name, name.encode()) for name in names) + END)
    subprocess.run(["tar", "-xf", "s.tar"], cwd=tmp_path, check=True)
    assert {name: (tmp_path / name).read_text() for name in names} == {name: name for name in names}
