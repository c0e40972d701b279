"""docs/training.md: its commands compose, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from medclip.cli import on_one_line
from medclip.config import CONF
from tests.test_readme import commands

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "training.md").read_text()
COMMANDS = commands("\n".join(re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)))


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[-1])
def test_commands_compose(words: list[str]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(words[1], on_one_line(words[2:]))
    assert words[1] == "export" or cfg.name == next(w for w in words if w.startswith("name=")).removeprefix("name=")


def test_what_it_names_is_there() -> None:
    named = re.findall(r"\b(adapt|callbacks|trainer|experiment|optim)=\[?([\w,]+)", TEXT)
    for group, names in named:
        for name in names.split(","):
            assert (CONF / group / f"{name}.yaml").is_file(), f"{group}={name}"
    assert {"chunked", "fsdp", "ddp", "ema"} <= {name for _, names in named for name in names.split(",")}
    for path in re.findall(r"`(scripts/[\w/.]+)`", TEXT):
        assert (ROOT / path).is_file(), path
