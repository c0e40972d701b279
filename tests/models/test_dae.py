"""The denoising auto-encoder: what it shows people, and that it learns to draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from medclip.models.dae import Dae
from medclip.models.grey import Grey
from medclip.phantoms.generate import generate
from medclip.types import UserError


def even(level: int, n: int = 2) -> Tensor:
    """uint8 RGB pictures of one grey."""
    return torch.full((n, 3, 96, 96), level, dtype=torch.uint8)


def test_draw_shows_the_picture_the_noisy_one_and_the_drawing_of_that() -> None:
    torch.manual_seed(0)
    model = Dae()
    image = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    grey = model.grey({"image": image})
    torch.manual_seed(1)
    shown = model.draw({"image": image})
    torch.manual_seed(1)
    loss = model({"image": image}).drawn
    for pictures in shown:
        assert pictures.shape == (2, 3, 128, 128) and not pictures.requires_grad
        assert torch.equal(pictures[:, 0], pictures[:, 1]) and torch.equal(pictures[:, 0], pictures[:, 2])
    assert torch.equal(shown.original[:, :1], grey)
    # The drawing is the one that the loss judges: of the same noise, against the clean picture.
    torch.testing.assert_close((shown.drawn - shown.original).square().mean((1, 2, 3)), loss.detach())


def test_the_noise_is_gaussian_and_what_people_see_of_it_is_cut_at_black_and_white() -> None:
    torch.manual_seed(0)
    off = Dae(noise=0.1).draw({"image": even(128)})
    noise = (off.seen - off.original)[:, 0]
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02) and abs(float(noise.mean())) < 2e-3
    assert float((noise.abs() < 0.1).float().mean()) == pytest.approx(math.erf(2**-0.5), abs=0.01)
    for level, sign in ((0, 1), (255, -1)):  # half of it is cut: 0.1 E[max(0, N)] = 0.1 / sqrt(2 pi) is left
        cut = Dae(noise=0.1).draw({"image": even(level)})
        left = sign * float((cut.seen - cut.original).mean())
        assert left == pytest.approx(0.1 / math.sqrt(2 * math.pi), rel=0.03)
    none = Dae(noise=0.0).draw({"image": even(128)})
    assert torch.equal(none.seen, none.original)
    with pytest.raises(UserError, match=r"model.noise is -0.1"):
        Dae(noise=-0.1)


def films(seed: int, count: int) -> Tensor:
    """Generated X-rays, grey, of 32 pixels, which the nets take too."""
    made = np.stack([phantom.image for phantom in generate("xray", seed, range(count), 64)])
    return Grey(32)({"image": torch.from_numpy(made).permute(0, 3, 1, 2)})


def test_in_a_few_dozen_steps_it_draws_x_rays_it_has_not_seen() -> None:
    torch.set_num_threads(1)
    seen, unseen = films(0, 64), films(1, 16)
    torch.manual_seed(0)
    model = Dae()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    dice = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def miss() -> float:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return float(model({"image": unseen}).drawn.mean())

    before = miss()
    for _ in range(60):
        loss = model({"image": seen[torch.randint(64, (32,), generator=dice)]}).drawn.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after, flat = miss(), float((unseen - seen.mean()).square().mean())
    assert after < 0.5 * before
    assert after < 0.5 * flat  # an even grey costs that: there is a picture
