"""Files are whole or absent, locks die with their process, and only a slide's own halves are swept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slides.files import Busy, OutputError, alone, renamed, sweep, sweep_old, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.bin"
    write_whole(path, b"old")

    def content() -> Iterator[bytes]:
        yield b"new" * 100_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, content())
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]
    write_whole(path, [b"n", b"ew"])
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_that_says_to_make_room(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"^cannot write .*a\.bin .*: make room and give the same command again"):
        write_whole(tmp_path / "a.bin", b"x")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (lambda p: write_whole(p, b""), lambda p: renamed(p).__enter__(), lambda p: alone(p).__enter__()):
        with pytest.raises(OutputError, match=r"^cannot write .*file.* \(.*\): choose another output folder$"):
            write(tmp_path / "file" / "below" / "a.bin")
    with pytest.raises(OutputError, match="choose another output folder"):
        write_whole(Path("/proc/nothing/here"), b"")


def test_a_renamed_file_appears_only_when_all_went_well(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(ValueError, match="half"), renamed(path) as part:
        part.write_bytes(b"half")
        raise ValueError("half")
    assert names(tmp_path) == []
    with renamed(path) as part:
        part.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and names(tmp_path) == ["a.h5"]


def test_two_writers_of_one_file_do_not_share_a_half(tmp_path: Path) -> None:
    with renamed(tmp_path / "a") as one, renamed(tmp_path / "a") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert names(tmp_path) == ["a"]


def test_a_lock_is_held_by_one_and_names_it(tmp_path: Path) -> None:
    lock = tmp_path / "s 1.lock"
    with (
        alone(lock),
        pytest.raises(Busy, match=rf"^s 1 is being written by another run \(process {os.getpid()} on "),
        alone(lock),
    ):
        pass
    with alone(lock):
        pass


def test_a_killed_process_lets_go_of_its_lock(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from slides.files import alone\n"
    code += "with alone(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    lock = tmp_path / "a.lock"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    with pytest.raises(Busy, match=f"process {child.pid} "), alone(lock):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    with alone(lock):
        pass


def test_only_a_slide_s_own_halves_are_swept(tmp_path: Path) -> None:
    mine = [".a-00000.tar.77.part", ".a.h5.1-ff.part", ".a_patches.h5.1-ab.part", ".a.parquet.5.part"]
    mine += [f".a.{ending}.12-0f.part" for ending in ("json", "geojson", "jpg", "pt")]
    others = [".a-1-00000.tar.77.part", ".a-1.h5.77.part", ".a.b.h5.1.part", ".ab.h5.1.part", "a.h5", ".aXh5.1.part"]
    others += [f".a[b]-00000.tar.{os.getpid()}.part", ".manifest.csv.1-aa.part"]
    for name in mine + others:
        (tmp_path / name).touch()
    (tmp_path / ".a.zarr.part").mkdir()
    sweep([tmp_path, tmp_path / "absent"], "a")
    assert names(tmp_path) == sorted(others) and not (tmp_path / ".a.zarr.part").exists()
    sweep([tmp_path], "a[b]")
    assert f".a[b]-00000.tar.{os.getpid()}.part" not in names(tmp_path)


def test_halves_of_tables_go_when_they_are_old(tmp_path: Path) -> None:
    for name in (".manifest.csv.1-aa.part", ".manifest.csv.2-bb.part", ".a.h5.3-cc.part"):
        (tmp_path / name).touch()
    for name in (".manifest.csv.1-aa.part", ".a.h5.3-cc.part"):
        os.utime(tmp_path / name, (1e9, 1e9))
    sweep_old(tmp_path, ["manifest.csv"])
    assert names(tmp_path) == [".a.h5.3-cc.part", ".manifest.csv.2-bb.part"]
