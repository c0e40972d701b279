"""The wheel, installed elsewhere, works by itself: configs inside, templates inside, a verb runs to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    (found,) = out.glob("medclip_adapt-*.whl")
    return found


def test_holds_code_configs_and_template_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"medclip", "slides"}
    configs = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    shipped = {name.removeprefix("medclip/conf/") for name in names if name.startswith("medclip/conf/")}
    assert shipped == {name for name in configs if not name.startswith("local/")}
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "medclip").rglob("*.j2")}
    assert "medclip/evals/report.html.j2" in templates <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


def test_runs_a_verb_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment that borrows this one's libraries, and not its medclip."""
    place = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    site = Path(sysconfig.get_paths()["purelib"])
    for item in site.iterdir():
        # Everything but the editable medclip and the hook that finds it.
        if "medclip" not in item.name.lower():
            (libraries / item.name).symlink_to(item)
    own = subprocess.check_output([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"])
    target = Path(own.decode().strip())
    (target / "libraries.pth").write_text(f"{libraries}\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    words = [
        "train",
        "experiment=tiny",
        "data.sources=[{phantoms: {kind: histology, samples: 8, size: 64}}]",
        "data.batch_size=4",
        "data.workers=0",
        "model.architecture.text_cfg.layers=1",
    ]
    ran = subprocess.run(
        [str(place / "bin" / "medclip"), *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "runs" / "train" / "checkpoints" / "last.ckpt").is_file()
    facts = json.loads((tmp_path / "runs" / "train" / "provenance.json").read_text())
    assert facts["packages"]["medclip-adapt"] == "0.1.0"
    where = subprocess.check_output([str(python), "-c", "import medclip; print(medclip.__file__)"], cwd=tmp_path)
    assert where.decode().startswith(str(target))
