"""Episodes: whole, the same for all who read them, and without gaps where an image is bad."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medclip.data.episodes import EpisodeData, EpisodeOrder, EpisodePlan, Shape, classes_of
from medclip.types import Batch, Preprocess, UserError

NAMES = ["head", "chest", "abdomen", "knee"]
PER_CLASS = 7
SHAPE = Shape(ways=2, shots=1, queries=2)


def grey(level: int) -> bytes:
    """A picture that its own grey tells from all others."""
    pixels = np.full((20, 20, 3), level, np.uint8)
    pixels[::2] += 3  # not flat
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """28 images of four classes, in turn, and one of none; each has a field `view` that three images share."""
    rows = []
    for i in range(4 * PER_CLASS + 1):
        (tmp_path / f"{i:02d}.png").write_bytes(grey(8 * i))
        label = NAMES[i % 4] if i < 4 * PER_CLASS else "elbow"
        rows.append({"image": f"{i:02d}.png", "key": f"k{i:02d}", "label": label, "view": f"v{i // 12}"})
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(table: Path, *, rank: int = 0, world: int = 1, **options: Any) -> EpisodeData:
    made = EpisodeData(
        [{"table": str(table)}],
        val_sources=[{"table": str(table), "name": "val"}],
        labels={"names": NAMES, "from": "class", "field": "label", "other": "zeros"},
        storage={"index": table.parent / "index", "cache": False},
        output=table.parent,
        **{"ways": 2, "shots": 1, "queries": 2, "episodes": 5, "val_episodes": 3, "batch_size": 2, "workers": 0}
        | {"max_bad_fraction": 0.5}
        | options,
    )
    model = SimpleNamespace(preprocess=Preprocess(size=(16, 16)), tokenizer=None)
    trainer = SimpleNamespace(global_rank=rank, world_size=world, lightning_module=SimpleNamespace(model=model))
    made.trainer = trainer  # type: ignore[assignment]
    made.setup("fit")
    return made


def trace(batch: Batch) -> tuple[Any, ...]:
    n = len(batch["key"])
    return (*batch["key"], batch["image"][:n].numpy().tobytes(), batch["epoch"], batch["position"])


def episodes(batches: Sequence[Batch]) -> list[tuple[str, ...]]:
    """Keys, an episode each."""
    found = []
    for batch in batches:
        keys = batch["key"]
        assert len(keys) % SHAPE.rows == 0
        found += [tuple(keys[i : i + SHAPE.rows]) for i in range(0, len(keys), SHAPE.rows)]
    return found


def class_of(key: str) -> int:
    return int(key[1:]) % 4


def sound(episode: Sequence[str]) -> bool:
    """Two classes one after the other, of each three different samples."""
    kinds = [class_of(key) for key in episode]
    return len(set(episode)) == 6 and kinds == [kinds[0]] * 3 + [kinds[3]] * 3 and kinds[0] != kinds[3]


def test_an_epoch_is_whole_episodes_with_their_labels(table: Path) -> None:
    batches = list(data(table, epochs=3).train_dataloader())
    assert [len(batch["key"]) for batch in batches] == [12, 12, 6] * 3
    found = episodes(batches)
    assert all(sound(episode) for episode in found)
    assert len(set(found)) == 15  # no epoch repeats another
    assert {class_of(key) for episode in found for key in episode} == {0, 1, 2, 3}
    for batch in batches:
        for row, key in enumerate(batch["key"]):
            assert batch["label"][row].tolist() == [float(k == class_of(key)) for k in range(4)]  # pyright: ignore
            assert abs(int(batch["image"][row].float().mean()) - 8 * int(key[1:])) <= 2  # the image is that key's


def test_classes_and_samples_are_drawn_evenly() -> None:
    groups = [np.arange(k * PER_CLASS, (k + 1) * PER_CLASS) for k in range(4)]
    ids = EpisodeOrder(groups, SHAPE, 3000, seed=1).ids(0)
    counts = np.bincount(ids, minlength=28)
    expected = 3000 * 6 / 28  # and a binomial's spread of 24
    assert counts.min() > expected - 120 and counts.max() < expected + 120
    pairs = Counter(tuple(ids[i : i + 6 : 3] // PER_CLASS) for i in range(0, len(ids), 6))
    assert len(pairs) == 12 and min(pairs.values()) > 250 - 80  # in both orders: the head learns no class by its place


def test_any_number_of_workers_sees_the_same(table: Path) -> None:
    first, second = ([trace(b) for b in data(table, epochs=2, workers=n).train_dataloader()] for n in (0, 2))
    assert first == second


@pytest.mark.parametrize("count", [4, 5])
def test_two_ranks_share_an_epoch_without_repeats(table: Path, count: int) -> None:
    whole = episodes(list(data(table, episodes=count, batch_size=1).train_dataloader()))
    ranks = [list(data(table, rank=r, world=2, episodes=count, batch_size=1).train_dataloader()) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 3 - (count == 4)
    shared = [episodes(list(pair)) for pair in zip(*ranks, strict=True)]
    assert [episode for pair in shared for episode in pair] == whole
    assert [len(batch["key"]) for batch in ranks[1]] == [6, 6] + [0] * (count - 4)  # the last one is rank 0's alone


def test_a_resume_amid_an_epoch_goes_on_in_the_same_line(table: Path) -> None:
    whole = [trace(batch) for batch in data(table, epochs=2).train_dataloader()]
    first = data(table, epochs=2)
    batches = iter(first.train_dataloader())
    before = [trace(next(batches)) for _ in range(2)]
    state = json.loads(json.dumps(first.state_dict()))
    second = data(table, epochs=2)
    second.load_state_dict(state)
    assert before + [trace(batch) for batch in second.train_dataloader()] == whole
    # On two ranks, of half the batch: what is left is shared without a gap.
    ranks = []
    for rank in (0, 1):
        part = data(table, epochs=2, rank=rank, world=2, batch_size=1)
        part.load_state_dict(state)
        ranks.append(list(part.train_dataloader()))
    rest = [episode for pair in zip(*ranks, strict=True) for episode in episodes(list(pair))]
    assert rest == episodes(list(data(table, epochs=2).train_dataloader()))[4:]


@pytest.mark.parametrize("change", [{"shots": 2}, {"episodes": 6}, {"distinct": "key"}, {"seed": 1}])
def test_other_episodes_are_no_resume(table: Path, change: dict[str, Any]) -> None:
    first = data(table)
    next(iter(first.train_dataloader()))
    second = data(table, **change)
    second.load_state_dict(first.state_dict())
    with pytest.raises(UserError, match="cannot resume"):
        second.train_dataloader()


def spoil(table: Path, *numbers: int) -> set[str]:
    for i in numbers:
        (table.parent / f"{i:02d}.png").write_bytes(b"no image")
    return {f"k{i:02d}" for i in numbers}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_gives_way_to_another_of_its_class(table: Path, workers: int) -> None:
    before = episodes(list(data(table, epochs=2).train_dataloader()))
    bad = spoil(table, 4, 8, 13)  # two neighbours of one class, and one of another
    assert bad & {key for episode in before for key in episode}
    batches = list(data(table, epochs=2, workers=workers).train_dataloader())
    after = episodes(batches)
    assert all(sound(episode) for episode in after) and not bad & {key for episode in after for key in episode}
    for old, new in zip(before, after, strict=True):  # nothing else has moved
        assert all(class_of(a) == class_of(b) and (a == b or a in bad) for a, b in zip(old, new, strict=True))
    listed = [json.loads(line) for line in (table.parent / "skipped.jsonl").read_text().splitlines()]
    assert {row["key"] for row in listed} <= bad and {row["reason"] for row in listed} == {"broken image"}
    counted = sum(batch["skipped"] for batch in batches)
    assert counted == len(listed) if workers == 0 else counted >= len(listed)  # each process meets it for itself


def test_the_replacement_does_not_hang_on_what_was_met_before(table: Path) -> None:
    """A resumed run, which knows of no bad image yet, goes on as the uninterrupted one."""
    spoil(table, 4, 8, 13, 2)
    whole = [trace(batch) for batch in data(table, epochs=3).train_dataloader()]
    for done in range(1, 9):
        first = data(table, epochs=3)
        batches = iter(first.train_dataloader())
        for _ in range(done):
            next(batches)
        second = data(table, epochs=3)
        second.load_state_dict(first.state_dict())
        assert [trace(batch) for batch in second.train_dataloader()] == whole[done:]


def test_one_spare_sample_of_a_class_serves_every_episode_of_a_batch(table: Path) -> None:
    bad = spoil(table, 0, 1, 2, 3)
    found = episodes(list(data(table, shots=2, queries=4, batch_size=5).train_dataloader()))
    assert not bad & {key for episode in found for key in episode}
    batch = next(iter(data(table, shots=2, queries=4, batch_size=5).train_dataloader()))
    for start in range(0, 60, 6):  # the six good ones of seven
        keys = batch["key"][start : start + 6]
        assert len(set(keys)) == 6 and len({class_of(key) for key in keys}) == 1


def test_a_class_without_enough_good_images_ends_the_run_in_one_line(table: Path) -> None:
    spoil(table, *range(0, 20, 4))  # leaves two of seven
    with pytest.raises(UserError, match=r"k\d\d is bad, and its class has no other sample left for an episode"):
        list(data(table, episodes=40, max_bad_fraction=1.0).train_dataloader())


def test_validation_is_the_same_every_time(table: Path) -> None:
    (loader,) = data(table).val_dataloader()
    first, again = ([trace(batch) for batch in loader] for _ in range(2))
    assert first == again and [len(one) - 3 for one in first] == [12, 6]


def test_a_class_has_each_value_of_distinct_once(table: Path) -> None:
    made = data(table, ways=2, shots=1, queries=1)
    assert [len(ids) for ids in made.groups(train=True)] == [7] * 4  # "elbow" is of no class
    own = classes_of(made.sources, made.declared, "view")
    assert {len(ids) for ids in own.values()} == {3} and all(list(ids) == sorted(ids) for ids in own.values())
    assert {int(ids[0]) for ids in own.values()} == {0, 1, 2, 3}  # the first of each view
    by_view = data(table, distinct="view")
    for episode in episodes(list(by_view.train_dataloader())):
        assert all(len({int(key[1:]) // 12 for key in part}) == 3 for part in (episode[:3], episode[3:]))
    with pytest.raises(UserError, match=r"data.distinct=wiev: source \S+ has no such field; the fields are: .*view"):
        data(table, distinct="wiev").train_dataloader()


def test_of_so_many_batches_the_first_come_again(table: Path) -> None:
    found = [trace(batch)[:-2] for batch in data(table, epochs=2, batches=1).train_dataloader()]
    whole = [trace(batch)[:-2] for batch in data(table).train_dataloader()]
    assert found == [whole[0]] * 2


def test_too_few_classes_and_values_without_a_meaning_are_one_line(table: Path) -> None:
    with pytest.raises(UserError, match=r"data.sources have 0 classes of 8 samples or more \(of 4 in all\)"):
        data(table, shots=5, queries=3).train_dataloader()
    with pytest.raises(UserError, match=r"data.val_sources have 4 classes .* an episode needs 5: lower data.ways"):
        data(table, ways=5).val_dataloader()
    for key, value in (("ways", 1), ("shots", 0), ("queries", True), ("episodes", 0), ("batch_size", 1.5)):
        with pytest.raises(UserError, match=rf"data.{key} is {value}: give a whole number"):
            data(table, **{key: value})


def test_places_of_a_rank_are_an_unbroken_piece() -> None:
    order = EpisodeOrder([np.arange(7), np.arange(7, 14)], SHAPE, 5, seed=0)
    found = [list(EpisodePlan(12, rank, 2).tickets(order, 0)) for rank in (0, 1)]
    assert [[list(ticket.places) for ticket in rank] for rank in found] == [
        [list(range(12)), list(range(24, 30))],
        [list(range(12, 24)), []],
    ]
    assert [ticket.position for ticket in found[1]] == [24, 30]
