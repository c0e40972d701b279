"""Features as others write them: each layout gives what was written, and no file leads anywhere else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from medclip.data.bad import BadSample
from medclip.data.bag_files import describe_bags, find_bags, open_bag
from medclip.types import UserError


def values(n: int = 23, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def write(path: Path, features: np.ndarray, encoder: str | None = "e", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("features", data=features, **options)
        if encoder is not None:
            data.attrs["encoder"] = encoder
        n = features.shape[-2]
        file.create_dataset("coords", data=np.stack([np.arange(n) * 256, np.arange(n)], 1).astype(np.int32))
        file["coords"].attrs["patch_size_level0"] = 256
    return path


LAYOUTS = {
    "trident": {"chunks": (1, 5), "maxshape": (None, 5)},
    "ours": {"chunks": (16, 5)},
    "contiguous": {},
    "compressed": {"chunks": (4, 5), "compression": "gzip"},
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "batch axis", "float16", "pt", "pt with batch axis", "old pt"])
def test_every_layout_reads_as_it_was_written(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclip.data.bag_files._BLOCK", 7)  # rows lie in four blocks, the last of them short
    wanted = values()
    path = tmp_path / ("s.1.pt" if "pt" in layout else "s.1.h5")
    if "pt" in layout:
        tensor = torch.from_numpy(wanted[None] if "axis" in layout else wanted)
        torch.save(tensor, path, _use_new_zipfile_serialization=layout != "old pt")
    elif layout == "batch axis":
        write(path, wanted[None])
    elif layout == "float16":
        wanted = wanted.astype(np.float16).astype(np.float32)
        write(path, wanted.astype(np.float16))
    else:
        write(path, wanted, **LAYOUTS[layout])
    bag = open_bag(path)
    assert (bag.slide, bag.patches, bag.dim) == ("s.1", 23, 5)
    whole = np.empty((23, 5), np.float32)
    bag.read(whole)
    assert np.array_equal(whole, wanted)
    rows = np.array([0, 6, 7, 20, 22])
    some = np.empty((5, 5), np.float32)
    bag.read(some, rows)
    assert np.array_equal(some, wanted[rows])
    half = np.empty((23, 5), np.float16)
    bag.read(half)
    assert np.array_equal(half, wanted.astype(np.float16))
    if "pt" in layout:
        assert bag.about() == {} and bag.encoder is None
    else:
        assert bag.about()["coords"][3].tolist() == [768, 3] and bag.about()["side"] == 256 and bag.encoder == "e"


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def test_no_file_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"a": Evil()}, "evil2.pt")
    write(tmp_path / "other.h5", values())
    with h5py.File("link.h5", "w") as file:
        file["features"] = h5py.ExternalLink("other.h5", "features")
    layout = h5py.VirtualLayout((23, 5), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "features", (23, 5))
    with h5py.File("virtual.h5", "w") as file:
        file.create_virtual_dataset("features", layout)
    with h5py.File("external.h5", "w") as file:
        file.create_dataset("features", (2, 5), np.float32, external=[("other.h5", 0, 40)])
    with h5py.File("huge.h5", "w") as file:
        file.create_dataset("features", (10**9, 1024), np.float32, chunks=(256, 1024))  # a file of a few kB
    with h5py.File("text.h5", "w") as file:
        file.create_dataset("features", data=np.array([[b"a"]]))
    with h5py.File("flat.h5", "w") as file:
        file.create_dataset("features", data=np.zeros(4))
    Path("noise.h5").write_bytes(b"noise")
    torch.save([values()], "list.pt")
    for name in ("evil.pt", "evil2.pt", "link.h5", "virtual.h5", "external.h5", "text.h5", "noise.h5", "list.pt"):
        with pytest.raises(BadSample, match=r"^read error"):
            open_bag(name)
    with pytest.raises(BadSample, match="over size limit"):
        open_bag("huge.h5")
    with pytest.raises(BadSample, match=r"not \(n, d\)"):
        open_bag("flat.h5")
    assert not Path("ran").exists()


def test_a_file_that_was_changed_meanwhile_is_a_bad_sample(tmp_path: Path) -> None:
    bag = open_bag(write(tmp_path / "a.h5", values()))
    write(tmp_path / "a.h5", values(9))
    with pytest.raises(BadSample, match="changed"):
        bag.read(np.empty((23, 5), np.float32))


def test_folders_are_found_as_each_tool_lays_them_out(tmp_path: Path) -> None:
    write(tmp_path / "clam/h5_files/a.h5", values())
    (tmp_path / "clam/pt_files").mkdir()
    torch.save(torch.zeros(2, 5), tmp_path / "clam/pt_files/a.pt")
    write(tmp_path / "trident/20x_256px_0px_overlap/features_uni/b.h5", values())
    write(tmp_path / "trident/20x_256px_0px_overlap/patches/b_patches.h5", values())
    assert {name: path.parent.name for name, path in find_bags(str(tmp_path / "clam")).items()} == {"a": "h5_files"}
    assert list(find_bags(str(tmp_path / "trident"))) == ["b"]
    assert list(find_bags([str(tmp_path / "clam"), str(tmp_path / "trident")])) == ["a", "b"]
    assert list(find_bags(str(tmp_path / "clam/pt_files"))) == ["a"]
    write(tmp_path / "trident/20x_256px_0px_overlap/features_conch/b.h5", values())
    with pytest.raises(UserError, match=r"several encoders \(20x_256px_0px_overlap/features_conch, "):
        find_bags(str(tmp_path / "trident"))
    with pytest.raises(UserError, match="slide a has two files"):
        find_bags([str(tmp_path / "clam"), str(tmp_path / "clam/pt_files")])
    with pytest.raises(UserError, match=r"^data.features: .* is no folder"):
        find_bags(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="run medclip extract"):
        find_bags(str(tmp_path / "empty"))


def test_a_set_is_what_most_of_its_files_are(tmp_path: Path) -> None:
    for number, (d, encoder) in enumerate([(5, "x"), (7, "x"), (7, "y"), (7, "y"), (5, "x"), (7, "y")]):
        write(tmp_path / f"{number}.h5", values(d=d), encoder)
    assert describe_bags(str(tmp_path)) == (7, "y")
    assert describe_bags(None, {"dim": 9}) == (9, "phantom")
    with pytest.raises(UserError, match=r"^data.features is not set"):
        describe_bags(None)
