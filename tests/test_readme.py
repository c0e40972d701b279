"""The README tells the truth: its commands compose, its files exist, its make targets are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from medclip.cli import VERBS, on_one_line
from medclip.config import CONF

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL))


def commands(text: str) -> list[list[str]]:
    """Shell commands as words: continued lines and quotes over several lines joined, comments left out."""
    found, pending = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote is still open
            continue
        pending = ""
        if words:
            found.append(words)
    assert not pending, pending
    return found


MEDCLIP = [words for words in commands(SHELL) if words[0] == "medclip"]


@pytest.mark.parametrize("words", MEDCLIP, ids=lambda words: " ".join(words[1:4])[:60])
def test_commands_compose(words: list[str]) -> None:
    assert words[1] in VERBS
    with initialize_config_dir(str(CONF), version_base="1.3"):
        rest = [word for word in words[2:] if word != "-m"]
        if "-m" in words:  # the first run of a sweep
            rest = [re.sub(r"=([^,\[{]+),[^\[{]*$", r"=\1", word) for word in rest]
        cfg = compose(words[1], on_one_line(rest))
    for name in cfg.get("evals") or {}:
        assert cfg.evals[name]._target_ and cfg.evals[name].data._target_
        given = cfg.evals[name].data.get("bags", cfg.evals[name].data)
        assert given.get("sources") or given.features


def test_the_real_commands_are_there() -> None:
    assert {words[1] for words in MEDCLIP} == {"train", "evaluate", "export", "extract", "heatmap", "serve"}
    assert any("pretrained=runs/" in word for words in MEDCLIP for word in words)


def test_files_exist() -> None:
    for path in re.findall(r"`((?:medclip|conf|scripts|docs|tests)/[\w/.]+\.\w+)`", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\]\((?!https?:)([\w/.]+)", README):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_every_experiment_has_its_row() -> None:
    for path in (CONF / "experiment").glob("*.yaml"):
        if "arxiv" in path.read_text().lower():
            assert f"`experiment={path.stem}`" in README, path.stem


def test_scripts_take_the_options_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(SHELL):
        if words[0] == "python":
            text = (ROOT / words[1]).read_text()
            assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--")), words
