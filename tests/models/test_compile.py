"""torch.compile in place: both towers traced whole, the same features and gradients, the same names."""

from __future__ import annotations

import pytest
import torch

from medclip.models.compile import compile
from medclip.models.load import load_clip
from medclip.types import UserError


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_features_gradients_and_names_stay(vit_cfg: dict, backend: str):
    torch._dynamo.reset()
    plain = load_clip(vit_cfg).train()
    clip = load_clip(vit_cfg).train()
    clip.load_state_dict(plain.state_dict())
    compile(clip, backend=backend)
    assert clip.state_dict().keys() == plain.state_dict().keys()
    batch = {"image": torch.randn(2, 3, 32, 32), "text": torch.randint(5, 60, (2, 16))}
    outs = [it(batch) for it in (clip, plain)]
    for out in outs:
        (out.image_features @ out.text_features.T).diagonal().sum().backward()
    torch.testing.assert_close(outs[0].image_features, outs[1].image_features)
    torch.testing.assert_close(outs[0].text_features, outs[1].text_features)
    for name, p in clip.named_parameters():
        torch.testing.assert_close(p.grad, plain.get_parameter(name).grad, atol=1e-5, rtol=1e-4, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # one a tower at least


def test_a_mode_that_torch_does_not_know_is_one_line(vit_cfg: dict):
    with pytest.raises(UserError, match=r"adapt\.compile: Unrecognized mode=fastest"):
        compile(load_clip(vit_cfg), mode="fastest")
    with pytest.raises(UserError, match=r"adapt\.compile: .*llvm"):
        compile(load_clip(vit_cfg), backend="llvm")
