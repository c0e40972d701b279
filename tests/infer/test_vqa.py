"""Who gets whose image: nobody its own, the same for every model, also where not all images are held."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medclip.infer.vqa import Pool, bare, blank, rows_of, words_of
from medclip.types import Batch, Preprocess


def batch(count: int) -> Batch:
    image = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 4, 4)
    return Batch(image=image, key=[str(i) for i in range(count)])


def filled(order: list[int], **options: int) -> Pool:
    pool = Pool(**options)
    seen = batch(max(order) + 1)
    for i in order:
        pool.see(f"im-{i}", seen, i)
    return pool


def test_a_derangement_that_depends_on_seed_and_names_alone() -> None:
    for count in (2, 3, 17):
        others = filled(list(range(count))).others()
        assert sorted(others) == sorted(others.values()) == sorted(f"im-{i}" for i in range(count))
        assert all(own != other for own, other in others.items())
    order = list(range(17))
    assert filled(order).others() == filled([*order[::-1], *order]).others() != filled(order, seed=1).others()
    assert filled([0]).others() == {}


def test_a_pool_that_cannot_hold_all() -> None:
    order = list(range(100))
    pool = filled(order, most=10)
    assert len(pool.held) == 10 and pool.held.keys() == filled(order[::-1], most=10).held.keys()
    others = pool.others()
    assert len(others) == 100 and set(others.values()) == set(pool.held)
    assert all(own != other for own, other in others.items())
    assert pool.held.keys() != filled(order, most=10, seed=1).held.keys()
    for name, row in pool.held.items():
        assert name == f"im-{int(row['image'][0, 0, 0, 0])}"  # type: ignore[typeddict-item]
    names = sorted(pool.held)[:3]
    assert rows_of(pool.held, names)["image"][:, 0, 0, 0].tolist() == [int(n[3:]) for n in names]  # type: ignore[typeddict-item]


def test_grey_is_what_the_model_takes_for_the_mean() -> None:
    seen = batch(3)
    grey = blank(seen, Preprocess(mean=(0.2, 0.3, 0.4)))
    assert (grey["image"] == round(255 * 0.3)).all() and grey["image"].shape == seen["image"].shape  # type: ignore[typeddict-item]
    own = Batch(**{**seen, "mean": torch.tensor([[0.1] * 3, [0.5] * 3, [0.8] * 3])})  # type: ignore[typeddict-item]
    assert blank(own, Preprocess())["image"][:, 0, 0, 0].tolist() == [26, 128, 204]  # type: ignore[typeddict-item]


def test_answers_without_their_type() -> None:
    assert [bare(a) for a in ("closed: yes", "open: left: upper", "yes", "closed")] == [
        "yes",
        "left: upper",
        "yes",
        "closed",
    ]


class Letters:
    context_length = 5

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        return torch.tensor([[*(len(word) for word in text.split()), 0, 0, 0, 0, 0][:5] for text in texts])


def test_words_at_positions() -> None:
    assert words_of(Letters(), "is it a lung") == ["is", "it", "a", "lung", ""]  # pyright: ignore[reportArgumentType]
    told = type("T", (Letters,), {"decode": lambda self, ids: "x" * ids[0]})()
    assert words_of(told, "is it a lung") == ["xx", "xx", "x", "xxxx", ""]
