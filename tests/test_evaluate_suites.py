"""Suites from a command line to the files: what they hold, and what happens where a set is not there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from medclip.config import CONF
from medclip.evaluate import main
from tests.evals.eval_toys import COLOURS

EVAL = """# @package evals.{name}
_target_: medclip.evals.zeroshot.ZeroShotClassification
_convert_: all
domain: {domain}
source: unconfirmed
core: {core}
root: ${{paths.data_root}}/{name}
needs: ["red/*", "green/*"]
get: "https://example.org/{name}: unpack it into the folder"
templates: ["a {{c}} square"]
data:
  _target_: medclip.data.evalset.EvalSet
  sources: [{{folder: "${{evals.{name}.root}}", caption: false}}]
  label: label
"""
SUITE = """# @package _global_
defaults:
  - /eval@evals.skin: skin
  - /eval@evals.eye: eye
  - /eval@evals.lung: lung
  - _self_
suites: {mine: {tasks: [skin, eye, lung]}}
"""
SAID = [
    "--config-dir=conf",
    "checkpoint=1",
    "load._target_=tests.evals.eval_toys.load_colour_clip",
    "bootstrap.samples=100",
    "workers=0",
    "output=out",
]


def write_set(folder: Path, wrong: int = 0) -> None:
    """Four squares, two of each colour, of which `wrong` green ones lie with the red."""
    for n, (label, colour) in enumerate([("red", "red"), ("green", "green"), ("green", "green"), ("red", "red")]):
        (folder / label).mkdir(parents=True, exist_ok=True)
        seen = "green" if label == "red" and n < 4 * wrong else colour
        pixels = np.full((32, 32, 3), COLOURS[seen][::-1], np.uint8)
        cv2.imwrite(str(folder / label / f"{n}.png"), pixels)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for group in ("eval", "suite"):
        (tmp_path / "conf" / group).mkdir(parents=True)
    for name, domain, core in (
        ("skin", "dermatology", "true"),
        ("eye", "ophthalmology", "false"),
        ("lung", "x", "true"),
    ):
        (tmp_path / f"conf/eval/{name}.yaml").write_text(EVAL.format(name=name, domain=domain, core=core))
    (tmp_path / "conf/suite/mine.yaml").write_text(SUITE)
    write_set(tmp_path / "data/skin")
    write_set(tmp_path / "data/eye", wrong=1)  # both of the red ones are green: half is right

    def call(*arguments: str, choice: str = "suite=mine") -> int:
        monkeypatch.setattr(sys, "argv", ["medclip evaluate", *SAID, choice, *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


def test_an_incomplete_suite_is_refused_before_anything_is_done(run, tmp_path: Path, capsys) -> None:
    assert run() == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medclip evaluate:")]
    assert "suite mine is incomplete: 1 of its 3 sets are not there (lung)" in line
    assert "suite_incomplete=allow" in line and not (tmp_path / "out").exists()
    # A part of a set is no set either, nor is a task that was taken out.
    (tmp_path / "data/lung/red").mkdir(parents=True)
    assert run() == 2 and "(lung)" in capsys.readouterr().err
    write_set(tmp_path / "data/lung")
    assert run("~evals.eye") == 2 and "1 of its 3 sets are not there (eye)" in capsys.readouterr().err


def test_a_complete_suite(run, tmp_path: Path, capsys) -> None:
    write_set(tmp_path / "data/lung")
    assert run() == 0
    found = json.loads((tmp_path / "out/suites.json").read_text())["mine"]
    assert found["present"] == ["skin", "eye", "lung"] and found["missing"] == []
    assert found["overall"]["estimates"]["checkpoint"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["core"]["tasks"] == ["skin", "lung"] and found["core"]["estimates"]["checkpoint"]["value"] == 1
    assert {k: d["estimates"]["checkpoint"]["value"] for k, d in found["domains"].items()} == {
        "dermatology": 1,
        "ophthalmology": 0.5,
        "x": 1,
    }
    records = json.loads((tmp_path / "out/results.json").read_text())
    assert [(r["domain"], r["source"]) for r in records][:2] == [
        ("dermatology", "unconfirmed"),
        ("ophthalmology", "unconfirmed"),
    ]
    assert "suite mine: mean of 3 tasks\n  all (3)  checkpoint  0.833" in capsys.readouterr().out


def test_an_average_over_the_rest_says_so(run, tmp_path: Path, capsys) -> None:
    assert run("suite_incomplete=allow") == 0
    found = json.loads((tmp_path / "out/suites.json").read_text())["mine"]
    assert found["missing"] == ["lung"]
    assert found["overall"]["estimates"]["checkpoint"]["value"] == pytest.approx(0.75)
    assert "mean of 2 tasks of 3; INCOMPLETE, without lung" in capsys.readouterr().out
    assert run("suite_incomplete=allow", "paths.data_root=nowhere", "overwrite=true") == 2
    assert "3 of its 3 sets are not there" in capsys.readouterr().err
    assert run("suite_incomplete=maybe") == 2 and "choose refuse or allow" in capsys.readouterr().err


def test_sets_lie_where_one_is_told(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_set(tmp_path / "elsewhere/thorax")
    assert run("evals.lung.root=elsewhere/thorax") == 0
    # Sources that do not look into the root need nothing there.
    sources = "evals.lung.data.sources=[{folder: elsewhere/thorax, caption: false}]"
    assert run(sources, "overwrite=true") == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    write_set(tmp_path / "moved/lung")
    monkeypatch.setenv("MEDCLIP_DATA", str(tmp_path / "moved"))
    assert run("overwrite=true") == 0
    # Without a suite, a missing set says how to get it.
    assert run("evals.skin.root=gone", "overwrite=true", choice="eval=[skin]") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medclip evaluate:")]
    assert "gone has no red/* and no green/*: get it from https://example.org/skin: unpack it into the folder" in line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("evals.skin.source=perhaps", "evals.skin.source=perhaps: choose confirmed or unconfirmed"),
        ("evals.skin.core=perhaps", "evals.skin.core=perhaps: choose true or false"),
        ("+suites.mine.metric=brier", "suites.mine.metric=brier: choose one of acc1"),
        ("suites.mine.tasks=[skin,skin]", "name each evaluation once"),
    ],
)
def test_what_the_user_can_mend_is_one_line(run, tmp_path: Path, capsys, argument: str, message: str) -> None:
    write_set(tmp_path / "data/lung")
    assert run(argument) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medclip evaluate:")]
    assert message in line


@pytest.mark.parametrize(("suite", "count"), [("path9", 9), ("biomedica40", 40)])
def test_shipped_suites_hold_what_they_say(suite: str, count: int) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", [f"suite={suite}"])
    tasks = list(cfg.suites[suite].tasks)
    assert len(tasks) == len(set(tasks)) == count
    assert sorted(tasks) == sorted(cfg.evals)
    assert all(cfg.evals[task].domain and cfg.evals[task].source for task in tasks)
    # No two of its tasks are of the same images.
    for task in tasks:
        head = (CONF / f"eval/{task}.yaml").read_text().replace("\n# ", " ")
        others = re.findall(r"Same images as ([\w' ]+?)[,.]", head)
        twins = {other for text in others for other in tasks if other in text.split()}
        assert not twins, f"{task} and {twins}"


def test_path9_uses_one_template_each() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", ["suite=path9", "eval=[mhist]"])
    assert set(cfg.evals) == {*cfg.suites.path9.tasks, "mhist"}  # a suite goes with other evaluations
    assert all(len(cfg.evals[task].templates) == 1 for task in cfg.suites.path9.tasks)
    assert dict(cfg.evals.pcam.classes) == {
        0: ["lymph nodes without any metastases"],
        1: ["lymph nodes containing metastases"],
    }
