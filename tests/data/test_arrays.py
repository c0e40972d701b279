"""Arrays and Arrow files as sources: what is read, and what of a hostile file is not."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest

from medclip.data.arrays import open_arrays
from medclip.data.arrow import open_arrow
from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.formats import open_picture
from medclip.data.sources import open_sources
from medclip.types import UserError

NONE = CaptionRule.parse(False)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 12, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["npz", "h5"])
@pytest.mark.parametrize("grey", [False, True])
def test_pixels_and_labels_come_back_to_the_bit(tmp_path: Path, pixels: np.ndarray, ending: str, grey: bool) -> None:
    pixels = pixels[..., 0] if grey else pixels
    labels = np.array([[3], [1], [4], [1], [5]])
    path = tmp_path / f"a.{ending}"
    if ending == "npz":
        np.savez_compressed(path, x=pixels, y=labels)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=pixels, chunks=(2, *pixels.shape[1:]), compression="gzip")
            file["y"] = labels.reshape(5, 1, 1, 1)
    source = open_arrays("a", {"images": f"{path}:x", "labels": f"{path}:y"}, NONE)
    copy = pickle.loads(pickle.dumps(source.select(np.array([1, 4]))))
    assert [copy.fields(i)["label"] for i in range(2)] == [1, 5] and copy.key(1) == "x/0000004"
    for i, number in enumerate((1, 4)):
        seen = open_picture(copy.read(i).image, 10**6).pixels(1)
        assert np.array_equal(seen, pixels[number] if not grey else np.repeat(pixels[number][..., None], 3, axis=2))


def test_columns_of_labels_have_names(tmp_path: Path, pixels: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", x=pixels, y=np.eye(5, 2, dtype=np.uint8))
    place = {"images": f"{tmp_path}/a.npz:x", "labels": f"{tmp_path}/a.npz:y"}
    source = open_arrays("a", place | {"columns": ["mass", "nodule"]}, NONE)
    assert source.fields(1) | {"key": ""} == {"key": "", "caption": None, "number": 1, "mass": 0, "nodule": 1}
    with pytest.raises(UserError, match=r"2 labels an image, but .* names 0"):
        open_arrays("a", place, NONE)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.empty(5, dtype=object)
    objects[:] = Bomb()
    np.savez(tmp_path / "a.npz", x=pixels, y=objects)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(UserError, match="y holds Python objects, which are not unpickled"):
        open_arrays("a", {"images": "a.npz:x", "labels": "a.npz:y"}, NONE)
    assert not (tmp_path / "exploded").exists()


def test_an_array_says_its_size_before_it_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("x.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 1000, 1000, 3)}
        np.lib.format.write_array_header_1_0(member, header)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="over the limit"):
        open_arrays("a", {"images": f"{tmp_path}/a.npz:x"}, NONE)


def test_hdf5_leads_to_no_other_file(tmp_path: Path, pixels: np.ndarray) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = pixels
    (tmp_path / "raw.bin").write_bytes(pixels.tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["linked"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")
        stored = [(str(tmp_path / "raw.bin"), 0, pixels.size)]
        file.create_dataset("stored", shape=pixels.shape, dtype=np.uint8, external=stored)
        layout = h5py.VirtualLayout(shape=pixels.shape, dtype=np.uint8)
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", shape=pixels.shape)
        file.create_virtual_dataset("virtual", layout)
        file["soft"] = h5py.SoftLink("/linked")
    for name in ("linked", "stored", "virtual", "soft"):
        with pytest.raises(UserError, match=f"{name} is no array of this file"):
            open_arrays("a", {"images": f"{tmp_path}/a.h5:{name}"}, NONE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "write {images: 'FILE:ARRAY'"),
        ({"images": "a.npz:x", "split": "test"}, "write {images: 'FILE:ARRAY'"),
        ({"images": "a.npz"}, "write FILE:ARRAY"),
        ({"images": "b.npz:x"}, "b.npz is not there"),
        ({"images": "a.npz:z"}, r"no array 'z' \(it has cut, floats, x, y\)"),
        ({"images": "a.npz:floats"}, "floats holds float64, not uint8 pixels"),
        ({"images": "a.npz:y"}, r"has the shape \(5, 1\)"),
        ({"images": "a.npz:x", "labels": "a.npz:floats"}, "not whole numbers"),
        ({"images": "a.npz:x", "labels": "a.npz:cut"}, "4 labels for 5 images"),
        ({"images": "broken.npz:x"}, "cannot read broken.npz: .*download it again"),
        ({"images": "broken.h5:x"}, "cannot read broken.h5: .*download it again"),
        ({"images": "a.txt:x"}, "unknown ending '.txt'"),
    ],
)
def test_bad_arrays_get_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray, config: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = np.zeros((5, 1), np.uint8)
    np.savez("a.npz", x=pixels, y=labels, cut=labels[:4], floats=np.ones((5, 12, 9)))
    for name in ("broken.npz", "broken.h5", "a.txt"):
        Path(name).write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(UserError, match=message) as error:
        open_arrays("a", config, NONE)
    assert "\n" not in str(error.value)


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def test_arrow_rows_in_the_order_of_files_with_their_metadata(tmp_path: Path) -> None:
    rows = [
        {
            "image": {"bytes": b"png %d" % n, "path": "/etc/passwd"},
            "part": "ab"[n % 2],
            "asked": {"options": ["x", "y"]},
        }
        for n in range(7)
    ]
    rows[3]["image"] = {"bytes": None, "path": "/etc/passwd"}  # never followed
    write_arrow(tmp_path / "t-0.arrow", rows[:4])
    write_arrow(tmp_path / "t-1.arrow", rows[4:])
    [source] = open_sources([{"arrow": f"{tmp_path}/*.arrow", "filter": 'part == "b"', "caption": False}])
    source = pickle.loads(pickle.dumps(source))
    assert [source.fields(i)["asked"] for i in range(len(source))] == 3 * [{"options": ["x", "y"]}]
    assert [source.read(i).image for i in (0, 2)] == [b"png 1", b"png 5"]
    with pytest.raises(BadSample, match="row 3 has no bytes in image"):
        source.read(1)


def test_broken_arrow_files_get_one_line(tmp_path: Path) -> None:
    write_arrow(tmp_path / "good.arrow", [{"image": b"x" * 50, "name": "n" * 40} for _ in range(4)])
    whole = (tmp_path / "good.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: len(whole) // 2])
    # An offset of a text far beyond the end of the file.
    place = whole.rindex((40).to_bytes(4, "little") + (80).to_bytes(4, "little"))
    (tmp_path / "wild.arrow").write_bytes(whole[:place] + b"\xff\xff\xff\x7f" + whole[place + 4 :])
    write_arrow(tmp_path / "other.arrow", [{"picture": b"x"}])
    for name, message in (
        ("cut", "cannot read .*cut.arrow as an Arrow stream"),
        ("wild", "cannot read .*wild.arrow as an Arrow stream"),
        ("other", r"no column 'image' \(it has picture\)"),
        ("none", "no file matches"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_arrow("a", str(tmp_path / f"{name}.arrow"), NONE)
        assert "\n" not in str(error.value)
