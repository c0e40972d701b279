"""The command line: what users mistype gets one line and status 2, never a traceback; nothing is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from medclip.cli import VERBS, main

ROOT = Path(__file__).parent.parent


def medclip(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "medclip.cli", *words], cwd=cwd, capture_output=True, text=True)


def test_help_and_version() -> None:
    done = medclip("--help")
    assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)
    assert medclip("--version").stdout.startswith("medclip 0.")
    assert medclip().returncode == 2
    wrong = medclip("trian")
    assert wrong.returncode == 2 and "unknown verb 'trian'" in wrong.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    done = medclip(verb, "--help")
    assert done.returncode == 0 and "Override anything" in done.stdout, done.stderr
    printed = medclip(verb, "--cfg", "job")
    assert printed.returncode == 0 and ("port: " if verb == "serve" else "output: ") in printed.stdout


SOURCE = "data.sources=[{phantoms: {kind: xray, samples: 8, size: 64}}]"
TINY = ["train", "experiment=tiny", SOURCE]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*TINY, "data.batchsize=4"], "Could not override 'data.batchsize'"),
        ([*TINY, "model=vit_giant"], "vit_giant"),
        ([*TINY, "model=clip_b32", "model.architecture=ViT-B-33", "model.pretrained=null"], "did you mean ViT-B-"),
        (["train", "experiment=tiny"], "data.sources is empty"),
        (["train", "experiment=tiny", "data=shards", "data.sources.0.urls=nowhere/*.tar"], "no shard matches"),
        ([*TINY, "+data.sources.0.filter=\"phantom.label == 'elbow'\""], "none of its 8 samples passes the filter"),
        ([*TINY, "+data.sources.0.filter=\"organ == 'elbow'\""], "no sample has the field 'organ'; the fields are: "),
        ([*TINY, "+data.sources.0.filter=\"__import__('os')\""], "filter"),
        ([*TINY, "+data.sources.0.filter=organ == 'elbow'"], "quote what holds spaces"),
        ([*TINY, "output=/proc/nothing/here"], "cannot write to output folder"),
        ([*TINY, "model=local", "model.pretrained=tests"], "no open_clip model"),
        ([*TINY, "task.schedule.warmup=-1"], "task.schedule.warmup is -1"),
        ([*TINY, "loss=[clip]", "+loss.weights.distill=1"], "loss.weights names ['distill']"),
        (["evaluate", "checkpoint=nowhere.ckpt", "eval=[zeroshot]"], "Missing mandatory value"),
        (["evaluate", "suite=null", "checkpoint=x"], "suite=null: a group takes the name of a config"),
        (["export", "checkpoint=tests", "output=x"], "no open_clip model"),
        (["demo", "data_folder=nowhere"], "is no folder"),
        (["demo", "data_folder=docs"], "holds no pairs"),
    ],
)
def test_one_line_says_what_and_how_to_mend(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("tests", "docs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["medclip", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    errors = capfd.readouterr().err
    lines = [line for line in errors.splitlines() if line.strip()]
    assert stop.value.code == 2, errors
    assert len(lines) == 1 and lines[0].startswith(f"medclip {words[0]}: ") and says in lines[0], errors
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("medclip ", set(VERBS)),
        ("medclip tr", {"train"}),
        ("medclip train experiment=", {"experiment=tiny"}),
        ("medclip train optim.l", {"optim.lr="}),
        ("medclip evaluate eval=z", {"eval=zeroshot"}),
        ("medclip nonsense x", set()),
    ],
)
def test_tab_completion(
    line: str, offers: set[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setattr(sys, "argv", ["medclip", "-sc", "query=bash"])
    main()
    found = set(capfd.readouterr().out.split())
    assert offers <= found and (offers or not found)


def test_tab_completion_is_for_the_command() -> None:
    done = medclip("-sc", "install=bash")
    assert done.returncode == 0 and done.stdout.rstrip().endswith("hydra_bash_completion medclip")
