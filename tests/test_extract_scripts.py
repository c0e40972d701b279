"""The scripts for clusters: what they write, what they say of failures, and that patches need no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from medclip.models.folder import write_folder
from medclip.models.load import load_clip
from slides.h5 import read_coords, read_features
from tests.slides.runs import REQUEST, contents, extract, leftovers
from tests.slides.toys import toy_slide

ROOT = Path(__file__).parent.parent
SMALL = ["--size", "64", "--coverage", "0.2"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides large enough for what the scripts take for dust."""
    folder = tmp_path_factory.mktemp("scripts")
    lines = ["slide,path,patient"]
    for name in ("one", "two"):
        toy_slide(folder / f"{name}.svs", 900, 800, mpp=0.5, seed=len(lines))
        lines.append(f"{name},{name}.svs,p{len(lines)}")
    (folder / "cohort.csv").write_text("\n".join([*lines, "gone,gone.svs,p3"]))
    return folder


def script(name: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def in_process(name: str, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    return __import__(name).main()


def test_patches_with_two_processes_and_an_array_job_s_parts(cohort: Path, tmp_path: Path) -> None:
    words = ["--cohort", cohort / "cohort.csv", *SMALL, "--per-shard", 7, "--no-drawings"]
    done = script("extract_patches", *words, "--out", tmp_path / "whole", "--processes", 2, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout) == {"ok": 2, "failed": 1}, done.stderr
    assert "extract_patches: gone: " in done.stderr and "no such file" in done.stderr and "Traceback" not in done.stderr
    for number in range(2):
        script("extract_patches", *words, "--out", tmp_path / "parts", "--part", number, 2, cwd=tmp_path)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    del whole["manifest.csv"], parts["manifest.csv"]
    assert whole == parts and leftovers(tmp_path) == []
    coords, found = read_coords(tmp_path / "whole/20x_64px_0px_overlap/patches/one_patches.h5")
    assert len(coords) > 10 and found["mpp"] == 0.5


def test_it_needs_neither_torch_nor_hydra(cohort: Path, tmp_path: Path) -> None:
    """As on a cluster's node without them: importing either fails."""
    for name in ("torch", "hydra", "medclip"):
        (tmp_path / "none" / name).mkdir(parents=True)
        (tmp_path / "none" / name / "__init__.py").write_text("raise ImportError('not on this machine')")
    (tmp_path / "none" / "slides").symlink_to(ROOT / "slides")
    command = [sys.executable, str(ROOT / "scripts/extract_patches.py"), "--cohort", str(cohort / "one.svs"), *SMALL]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "none")}
    command += ["--out", str(tmp_path / "out"), "--stain", "reinhard", "--stain-target", str(tmp_path / "t.png")]
    toy_target(tmp_path / "t.png")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout) == {"ok": 1}, done.stderr


def toy_target(path: Path) -> None:
    import cv2

    from tests.slides.toys import toy_pixels

    cv2.imwrite(str(path), toy_pixels(600, 500, 4)[0][..., ::-1])


def test_the_options_are_the_request_s(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cohort", cohort / "one.svs", *SMALL, "--out", tmp_path / "out", "--processes", 1, "--threads", 1]
    words += ["--mpp", 0.7, "--overlap", 16, "--remove", "--save", "arrays", "--exact", "--tissue", "hsv"]
    assert in_process("extract_patches", monkeypatch, *words) == 0
    from slides.request import Request

    same = Request(size=64, coverage=0.2, mpp=0.7, overlap=16, remove=(), exact=True, tissue="hsv")
    extract([cohort / "one.svs"], tmp_path / "same", same, save=("arrays",))
    with h5py.File(tmp_path / "out/arrays/one.h5") as a, h5py.File(tmp_path / "same/arrays/one.h5") as b:
        assert np.array_equal(a["imgs"][:], b["imgs"][:]) and len(a["imgs"]) > 5  # type: ignore[index,arg-type]
    assert json.loads(capsys.readouterr().out) == {"ok": 1}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cohort", "nowhere"], "extract_patches: no slide in nowhere"),
        (["--cohort", "{cohort}/one.svs", "--size", "0"], "size 0"),
        (["--cohort", "{cohort}/one.svs", "--mpp", "nan"], "mpp is nan"),
        (["--cohort", "{cohort}/one.svs", "--quality", "0"], "of quality 0"),
        (["--cohort", "{cohort}/one.svs", "--part", "3", "2"], "counts from 0"),
        (["--cohort", "{cohort}/one.svs", "--mpp-table", "gone.csv"], "gone.csv: cannot be read"),
        (["--cohort", "{cohort}/one.svs", "--out", "/proc/nothing"], "choose another output folder"),
        (["--cohort", "{cohort}/one.svs", "--masks", "gone"], "extract_patches: one: one: no mask in gone"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    cohort: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    given = [word.format(cohort=cohort) for word in words]
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    assert in_process("extract_patches", monkeypatch, *given, *out, "--processes", 1) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if " slides, " not in line]
    assert len(lines) == 1 and says in lines[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "patch_size": 32, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 16, "heads": 2},
    }
    path = tmp_path_factory.mktemp("model") / "toy"
    write_folder(load_clip(cfg), path, title="toy")
    return path


def test_features_at_the_places_of_extract_patches(
    cohort: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--cohort", cohort / "cohort.csv", *SMALL]
    in_process("extract_patches", monkeypatch, *base, "--out", tmp_path / "p", "--layout", "clam", "--processes", 1)
    options = ["--clip", model, "--device", "cpu", "--batch-size", 16, "--block", 20, "--layout", "clam"]
    capsys.readouterr()
    for out, more in (("new", []), ("given", ["--coords", tmp_path / "p/patches"])):
        assert in_process("extract_features", monkeypatch, *base, *options, "--out", tmp_path / out, *more) == 0
        said = capsys.readouterr()
        counts = json.loads(said.out)
        assert (counts["ok"], counts["failed"]) == (2, 1) and 0 <= counts["waiting"] <= 1
        assert "extract_features: gone: " in said.err
    for name in ("one", "two"):
        values, coords, _ = read_features(tmp_path / f"new/features_toy/h5_files/{name}.h5")
        others, places, _ = read_features(tmp_path / f"given/features_toy/h5_files/{name}.h5")
        assert np.allclose(values, others, atol=1e-6) and np.array_equal(coords, places)
        tensor = torch.load(tmp_path / f"new/features_toy/pt_files/{name}.pt", weights_only=True)
        assert np.array_equal(tensor.numpy(), values)


def test_features_of_a_timm_model_from_a_file(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pt")
    words = ["--cohort", cohort / "one.svs", *SMALL, "--timm", "test_vit", "--device", "cpu", "--out", tmp_path / "out"]
    assert in_process("extract_features", monkeypatch, *words, "--weights", tmp_path / "gone.pt") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("extract_features: ") and "gone.pt" in line
    words += ["--weights", tmp_path / "w.pt", "--name", "mine"]
    assert in_process("extract_features", monkeypatch, *words) == 0
    values, _, found = read_features(tmp_path / "out/20x_64px_0px_overlap/features_mine/one.h5")
    assert values.shape[1] == 64 and found["encoder"] == "mine" and np.ptp(values, axis=0).max() > 0


def test_the_request_s_defaults_are_the_script_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import extract_patches

    from slides.request import Request

    chosen = extract_patches.arguments().parse_args(["--cohort", "x", "--out", "y"])
    assert extract_patches.request_of(chosen) == Request()
    assert Request() != REQUEST
