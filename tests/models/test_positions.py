"""Sine-cosine positions against the formula, entry by entry, in the order of published weights."""

from __future__ import annotations

import math

import pytest
import torch

from medclip.models.positions import fit_positions, sincos_positions
from medclip.types import UserError


def test_every_entry_is_the_formula():
    dim, rows, columns = 16, 3, 5
    found = sincos_positions(dim, (rows, columns))
    assert found.shape == (1, 1 + rows * columns, dim)
    assert not found[0, 0].any()  # the class token has none
    for row in range(rows):
        for column in range(columns):
            expected = []
            for place in (column, row):  # the column comes first
                angles = [place * 10000 ** (-4 * i / dim) for i in range(dim // 4)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            assert found[0, 1 + row * columns + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_width_must_be_a_multiple_of_four():
    with pytest.raises(UserError, match="multiple of 4, not 6"):
        sincos_positions(6, (2, 2))


def test_fitting_keeps_the_class_token_and_is_the_identity_at_its_own_size():
    own = torch.randn(1, 1 + 16, 8)
    assert fit_positions(own, (4, 4)) is own
    wide = fit_positions(own, (6, 6))
    assert torch.equal(wide[:, 0], own[:, 0])
    # From 4 to 8 by pixel centres, entry 3 lies at 1.25 of the old grid: Keys' kernel (a = -0.75) over 0, 1, 2, 3.
    ramp = torch.arange(4.0).repeat(4)[None, :, None].expand(1, 16, 8)  # the column's number
    finer = fit_positions(torch.cat([own[:, :1], ramp], 1), (8, 8))[0, 1:].view(8, 8, 8)
    near, far = (lambda t: (1.25 * t - 2.25) * t * t + 1), (lambda t: -0.75 * (((t - 5) * t + 8) * t - 4))
    assert finer[2, 3].tolist() == pytest.approx([near(0.25) + 2 * near(0.75) + 3 * far(1.75)] * 8, abs=1e-5)
