"""Who may import whom: the rule that keeps a method in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {"losses", "heads", "models", "optim", "infer", "tasks", "callbacks", "curate", "phantoms"}
VERBS = {"cli", "config", "train", "evaluate", "extract", "heatmap", "export", "serve", "demo"}
MAY = {
    **{part: {"types"} for part in PARTS},
    "types": set(),
    "config": {"types"},
    "data": {"slides", "types", "phantoms"},
    "evals": {"infer", "types"},
    # What verbs drive.
    "cli": {"config"},
    "train": {"config", "types", "dry_run"},
    "dry_run": {"config", "types", "dry", "models", "data"},
    "dry": {"types"},
    "evaluate": {"config", "types", "evals"},
    "extract": {"config", "types", "evaluate", "slides"},
    "heatmap": {"config", "types", "evaluate", "slides"},
    "export": {"config", "types", "evals", "models", "evaluate", "callbacks"},
    "serve": {"config", "types", "evaluate", "models", "app", "slides"},
    "app": {"infer", "types", "slides"},
    "demo": {"config", "types", "data"},
}


def imported(path: Path) -> set[str]:
    """Names of our parts that a file imports: `data` for medclip.data.x, `slides` for slides.x."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = {tuple(name.split(".")) for name in names}
    ours = {words[1] for words in parts if words[0] == "medclip" and len(words) > 1}
    return {word for word in ours if not word.startswith("__")} | {"slides" for words in parts if words[0] == "slides"}


FILES = sorted((ROOT / "medclip").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_medclip(path: Path) -> None:
    part = path.relative_to(ROOT / "medclip").parts[0].removesuffix(".py")
    if part == "__init__":
        assert not imported(path)
        return
    assert part in MAY, f"medclip/{part} is new: say in this test what it may import"
    assert imported(path) <= MAY[part] | {part}


@pytest.mark.parametrize("path", sorted((ROOT / "slides").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_slides_know_nothing_of_medclip_torch_or_hydra(path: Path) -> None:
    text = path.read_text()
    names = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not names & {"medclip", "torch", "torchvision", "hydra", "omegaconf"}


def test_only_yaml_joins() -> None:
    """No `_target_` outside conf/ but in tests: the wiring has one home."""
    wired = [path for path in FILES if "_target_" in path.read_text()]
    assert [path.name for path in wired] == []
