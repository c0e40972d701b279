"""docs/scaling.md shows what scripts/scaling.py prints, and that follows from its inputs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from medclip.dry.gpus import find_gpu

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "scaling.py"))
PAGE = (ROOT / "docs" / "scaling.md").read_text()
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


def page_tables() -> list[dict[tuple[str, ...], list[float]]]:
    """The page's tables: (model, GPUs where there is such a column) -> the other numbers."""
    between = PAGE.split("<!-- tables")[1].split("<!-- end")[0]
    found = []
    for block in re.split(r"\n\n+", between):
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line[:1] == "|"
        ]
        if len(lines) > 2:
            keys = 2 if lines[0][1] == "GPUs" else 1
            found.append({tuple(line[:keys]): [number(cell) for cell in line[keys:]] for line in lines[2:]})
    return found


def number(cell: str) -> float:
    digits = re.sub(r"[^\d.]", "", cell)
    return float(digits) if digits else float("nan")


def test_the_pages_figures_follow_from_the_inputs() -> None:
    """All of them but the memory, by the formulas in the script's first lines, from the page's own FLOPs."""
    inputs = SCRIPT["Inputs"]()
    times, feeds, models = page_tables()
    # Parameters by hand: tests/test_dry_run.py. FLOPs: six a weight's use, two more for what chunks go through twice.
    assert {model[0]: row[0] for model, row in models.items()} == {"clip_b16": 149.6, "clip_l14": 427.6}
    assert models["clip_b16",][1] == pytest.approx((6 + 2 * 3 / 4) * 20.5, rel=0.02)
    for (model, gpus), (on_gpus, loader, network, _, hours, price) in times.items():
        n, flops, width = int(gpus), models[model,][1] * 1e9, {"clip_b16": 512, "clip_l14": 768}[model]
        peak = n * find_gpu(inputs.gpu).half * 1e12 * inputs.mfu / flops
        # The loss of all pairs takes a share of its own, which grows with their number.
        assert peak * 0.94 < on_gpus < peak * 1.005, (model, n)
        assert loader == n * inputs.cores * 1e3 / inputs.cpu_ms
        assert network == n * inputs.network * 1e9 / 8e3 / inputs.pair_kb
        seconds = inputs.samples / min(on_gpus, loader, network)
        assert hours == pytest.approx(seconds / 3600, abs=0.006)
        assert price == pytest.approx(seconds * n * inputs.price / 3600, abs=0.51)
        cores, rate, gathered, exchange, _ = feeds[model, gpus]
        assert cores == pytest.approx(on_gpus / n * inputs.cpu_ms / 1e3, abs=0.06)
        assert rate == pytest.approx(on_gpus / n * inputs.pair_kb / 1e3, abs=0.51)
        assert gathered == pytest.approx((n - 1) * inputs.batch * 2 * width * 4 / 1e6, abs=0.51)
        sent = 2 * (n - 1) / n * models[model,][0] * 4e6 + 2 * gathered * 1e6
        step = inputs.batch * n / min(on_gpus, loader, network)
        assert exchange == pytest.approx(100 * sent / inputs.link / 1e9 / step, abs=0.2)
    assert "Bytes read: 24.1 M pairs of 100 kB, 2.41 TB." in PAGE


@pytest.mark.slow
def test_the_page_shows_what_the_script_prints(capsys: pytest.CaptureFixture) -> None:
    assert SCRIPT["main"]([]) == 0
    assert capsys.readouterr().out.strip() in PAGE
