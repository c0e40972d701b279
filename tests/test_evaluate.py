"""The verb, from a command line to the files, with models and data of tests/evals/eval_toys.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from medclip.config import CONF
from medclip.evaluate import main, set_decode

# A user's own evaluation, found with --config-dir.
COLOURS = """# @package evals.colours
_target_: medclip.evals.zeroshot.ZeroShotClassification
templates: ["a {c} square"]
data: {_target_: tests.evals.eval_toys.ColourSet, patients: 20}
"""
ZERO_SHOT = [
    "--config-dir=conf",
    "eval=[colours]",
    "load._target_=tests.evals.eval_toys.load_colour_clip",
    "bootstrap.samples=100",
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/eval").mkdir(parents=True)
    (tmp_path / "conf/eval/colours.yaml").write_text(COLOURS)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["medclip evaluate", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


def test_two_checkpoints_end_in_a_report_and_a_table(run, tmp_path: Path, capsys) -> None:
    assert (
        run(*ZERO_SHOT, "checkpoints.base=0.2", "checkpoints.adapted=0.9", "+checkpoints.third=0.5", "output=out") == 0
    )
    records = json.loads((tmp_path / "out/results.json").read_text())
    assert [(r["model"], r["pretrained"]) for r in records] == [("base", "0.2"), ("adapted", "0.9"), ("third", "0.5")]
    assert records[1]["comparison"]["differences"]["acc1"]["verdict"] == "gain"
    written = ["config.yaml", "report.html", "results.json", "skipped.jsonl"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == written
    printed = capsys.readouterr().out
    assert "balanced" in printed and "report.html" in printed
    # Never overwritten silently.
    assert run(*ZERO_SHOT, "checkpoint=0.9", "output=out") == 2
    assert "is not empty" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/results.json").read_text()) == records
    assert run(*ZERO_SHOT, "checkpoint=0.9", "output=out", "overwrite=true") == 0
    assert [r["model"] for r in json.loads((tmp_path / "out/results.json").read_text())] == ["checkpoint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval=[zeroshot]"], "give either checkpoint=PATH or several"),
        ([*ZERO_SHOT, "checkpoint=1", "checkpoints.base=1"], "both were given"),
        ([*ZERO_SHOT, "checkpoint=1", "decode=quick"], "decode=quick: choose exact or fast"),
        (["checkpoint=1"], "no evaluation given"),
        ([*ZERO_SHOT, "checkpoint=1", "+evals.colours.classes={Red: red}"], "no configured class (configured: 'Red'"),
        ([*ZERO_SHOT, "checkpoint=1", "evals.colours.data.patients=0"], "nothing to evaluate"),
        ([*ZERO_SHOT, "checkpoint=1", "device=abacus"], "device=abacus cannot be used"),
        ([*ZERO_SHOT, "checkpoint=1", "bootstrap.samples=3"], "must be at least 100"),
        ([*ZERO_SHOT, "checkpoint=1", "bootstrap.samples=many"], "must be at least 100"),
        ([*ZERO_SHOT, "checkpoint=1", "+evals.colours.role=retain"], "evals.colours.role=retain: choose one of domain"),
        ([*ZERO_SHOT, "checkpoint=1", "batch_size=0"], "batch_size=0: give a whole number"),
        ([*ZERO_SHOT, "checkpoint=1", "precision=16"], "precision=16: choose one of fp32, bf16"),
        ([*ZERO_SHOT, "checkpoint=1", "batchsize=3"], "batchsize"),
        (
            ["checkpoint=1", "eval=[retrieval]", "evals.retrieval.data._target_=tests.evals.eval_toys.ColourSet"],
            "evals.retrieval.data.sources",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(run, capsys, arguments: list[str], message: str) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    line = [part for part in error.splitlines() if part.startswith("medclip evaluate:")]
    assert len(line) == 1 and message in line[0]
    assert "Traceback" not in error


@pytest.mark.parametrize("path", sorted((CONF / "eval").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_evaluation_composes_under_its_own_name(path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", [f"eval=[{path.stem}]"])
    assert list(cfg.evals) == [path.stem]
    node = OmegaConf.to_container(cfg.evals[path.stem])
    assert isinstance(node, dict)
    assert node["_target_"].startswith("medclip.evals.") and node["role"] in ("domain", "retention")


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_decode_is_of_every_set_that_does_not_say_itself(decode: str) -> None:
    words = [
        "eval=[medpix_modality,linear_probe,thorax]",
        "evals.medpix_modality.data.sources=[]",
        "+evals.thorax.data.exact=true",
        f"decode={decode}",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", words)
    cfg.evals.linear_probe.train = {"sources": []}
    set_decode(cfg)
    wanted = {"fast": False, "exact": None}[decode]
    assert cfg.evals.medpix_modality.data.get("exact") is wanted and cfg.evals.linear_probe.train.get("exact") is wanted
    assert cfg.evals.thorax.data.exact is True
