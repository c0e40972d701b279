"""The contact sheet holds the phantoms it says, and refuses in one line."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medclip.phantoms.generate import CLASSES, generate

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "contact_sheet.py"
_spec = spec_from_file_location("contact_sheet", SCRIPT)
assert _spec and _spec.loader
contact_sheet = module_from_spec(_spec)
_spec.loader.exec_module(contact_sheet)


def test_a_sheet_has_a_row_a_class_and_shows_the_phantoms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "sheet.png"
    options = ["--kind", "xray", "--size", "64", "--columns", "2", "--seed", "3"]
    assert contact_sheet.main([*options, "--out", str(out)]) == 0 and str(out) in capsys.readouterr().out
    page = np.asarray(Image.open(out))
    first = {p.label: p.image for p in reversed(generate("xray", 3, range(60), 64, per_patient=1))}
    windows = np.lib.stride_tricks.sliding_window_view(page[..., 0], (64, 64))
    tops = []
    for label in CLASSES["xray"]:
        corner = first[label][..., 0]
        candidates = np.argwhere((windows[:, :, 32, 32] == corner[32, 32]) & (windows[:, :, 0, 0] == corner[0, 0]))
        tops += [int(y) for y, x in candidates if np.array_equal(windows[y, x], corner)]
    assert len(tops) == len(CLASSES["xray"]) and tops == sorted(tops)


def test_boxes_are_drawn_only_when_asked_for(tmp_path: Path) -> None:
    pages = []
    for extra in ([], ["--boxes"]):
        out = tmp_path / f"sheet{len(extra)}.png"
        options = ["--kind", "xray", "--size", "64", "--columns", "1", "--out", str(out)]
        assert contact_sheet.main([*options, *extra]) == 0
        pages.append(np.asarray(Image.open(out)).astype(int))
    colour = [np.abs(page[..., 0] - page[..., 2]).max() for page in pages]
    assert colour[0] == 0 and colour[1] > 100  # X-rays and their labels are grey


def test_what_is_not_possible_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cases = [
        (("--size", "10", "--out", str(tmp_path / "a.png")), "phantom size 10 is not possible"),
        (("--size", "64", "--columns", "1", "--out", str(tmp_path / "file" / "a.png")), "cannot write"),
    ]
    for arguments, message in cases:
        assert contact_sheet.main(["--kind", "xray", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1
