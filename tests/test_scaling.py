"""docs/scaling.md shows what scripts/scaling.py prints, and that follows from its inputs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "scaling.py"))
TINY = {"samples": 1e6, "batch": 8, "chunk": 0, "gpu": "l4"}


def test_the_slowest_of_three_decides() -> None:
    """By hand: 8 cores at 2 ms are 4,000 pairs/s a GPU; 10 Gbit/s at 100 kB are 12,500."""
    cost, inputs = SCRIPT["cost"], SCRIPT["Inputs"]
    slow = cost("tiny_vit", 2, inputs(**TINY))
    assert slow.rate_loader == pytest.approx(8000) and slow.rate_network == pytest.approx(25000)
    assert slow.bound == "loader" and slow.hours == pytest.approx(1e6 / 8000 / 3600)
    assert slow.price == pytest.approx(2 * 3 * slow.hours)
    assert slow.gather_mb == pytest.approx(8 * 2 * 128 * 4 / 1e6)  # the other GPU's rows, of both towers
    starved = cost("tiny_vit", 2, inputs(**TINY, pair_kb=2700.0))
    assert starved.bound == "network" and starved.rate_network == pytest.approx(2 * 1.25e9 / 2.7e6)


@pytest.mark.slow
def test_the_page_shows_what_the_script_prints(capsys: pytest.CaptureFixture) -> None:
    assert SCRIPT["main"]([]) == 0
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert capsys.readouterr().out.strip() in page
