"""The WiSE-FT line: exact ends, the closed form between, and what must not be blended."""

from __future__ import annotations

import math

import pytest
import torch

from medclip.models.load import load_clip
from medclip.models.wiseft import blend
from medclip.types import UserError

State = dict[str, torch.Tensor]


@pytest.fixture
def states(vit_cfg: dict) -> tuple[State, State]:
    torch.manual_seed(0)
    return load_clip(vit_cfg).net.state_dict(), load_clip(vit_cfg).net.state_dict()


@pytest.mark.parametrize("alpha, which", [(0, 0), (1, 1), (0.0, 0), (1.0, 1)])
def test_ends_are_exact_to_the_bit(states: tuple[State, State], alpha: float, which: int):
    states[0]["visual.conv1.weight"][0, 0, 0, 0] = -0.0
    states[1]["visual.conv1.weight"][0, 0, 0, 0] = 1e-41  # denormal
    ours = blend(*states, alpha)
    for key, reference in states[which].items():
        assert ours[key].numpy().tobytes() == reference.numpy().tobytes(), key
        assert ours[key].data_ptr() != reference.data_ptr()


def test_between_is_the_straight_line(states: tuple[State, State]):
    base, tuned = states
    for key, value in blend(base, tuned, 0.3).items():
        torch.testing.assert_close(value, base[key] + 0.3 * (tuned[key] - base[key]))


def test_temperatures_blend_geometrically(states: tuple[State, State]):
    base, tuned = states
    base["logit_scale"], tuned["logit_scale"] = torch.tensor(math.log(4.0)), torch.tensor(math.log(100.0))
    assert blend(base, tuned, 0.5)["logit_scale"].exp().item() == pytest.approx(20.0, rel=1e-6)


def test_blend_of_equals_is_that_model(states: tuple[State, State]):
    base, _ = states
    for key, value in blend(base, base, 0.37).items():
        torch.testing.assert_close(value, base[key], rtol=1e-7, atol=0)


def test_refuses_what_is_not_one_model():
    state = {"w": torch.ones(2), "ids": torch.arange(3), "bn.num_batches_tracked": torch.tensor(0)}
    tuned = state | {"bn.num_batches_tracked": torch.tensor(9)}
    assert blend(state, tuned, 0.5)["bn.num_batches_tracked"] == 9
    with pytest.raises(UserError, match="integer tensor ids differs"):
        blend(state, state | {"ids": torch.arange(3) + 1}, 0.5)
    with pytest.raises(UserError, match="extra is in one model only"):
        blend(state, state | {"extra": torch.ones(1)}, 0.5)
    with pytest.raises(UserError, match=r"w is \(2,\) in the base, \(3,\) in the other"):
        blend(state, state | {"w": torch.ones(3)}, 0.5)
    with pytest.raises(UserError, match=r"alpha=1.5 is outside 0..1"):
        blend(state, state, 1.5)
