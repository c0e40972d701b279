"""Bags for training: the same for any workers and ranks, found again after a kill, and every number from its file."""

# pyright: reportTypedDictNotRequiredAccess=false
from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medclip.data.bag_memory import BagMemory
from medclip.data.bag_reader import BalancedOrder
from medclip.data.bag_table import open_cohort
from medclip.data.bags import BagData, BagSet
from medclip.phantoms.bags import BagRecipe, bag_row, make_bag
from medclip.types import UserError
from tests.data.test_bag_files import values, write

N = 30  # slides, of 15 patients


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bag k has 3 + k % 5 rows, all different; even patients are x, odd ones y."""
    rows = ["slide,patient,label,time,event"]
    for k in range(N):
        write(tmp_path / f"features_e/s{k:02d}.h5", values(3 + k % 5, 4, seed=k))
        rows.append(f"s{k:02d},p{k // 2:02d},{'xy'[k // 2 % 2]},{k + 1},{int(k % 3 > 0)}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def data(folder: Path, *, rank: int = 0, world: int = 1, **options: Any) -> BagData:
    given: dict[str, Any] = {"features": str(folder), "table": str(folder / "t.csv"), "output": folder}
    given |= {"seed": 1, "remember": 0}
    made = BagData(**given | options)
    trainer = SimpleNamespace(global_rank=rank, world_size=world)
    made.trainer = trainer  # type: ignore[assignment]
    made.setup("fit")
    return made


def trace(batch: Any) -> tuple[Any, ...]:
    n = len(batch["key"])
    return (*batch["key"], batch["bag"][:n].numpy().tobytes(), batch["epoch"], batch["position"])


def of(key: str) -> np.ndarray:
    k = int(key[1:])
    return values(3 + k % 5, 4, seed=k)


def keys(batches: list[Any]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


@pytest.mark.parametrize("remember", [0, 1e-6 * 3, 1])
@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_is_its_files_and_labels(folder: Path, size: int, remember: float) -> None:
    batches = list(data(folder, batch_size=size, epochs=2, remember=remember).train_dataloader())
    assert len(set(keys(batches))) == 18 and Counter(keys(batches)).most_common()[-1][1] == 2
    for batch in batches:
        assert len(batch["bag"]) == len(batch["real"]) == len(batch["label"]) == size
        for row, key in enumerate(batch["key"]):
            wanted = of(key)
            assert np.array_equal(batch["bag"][row, : len(wanted)].numpy(), wanted)
            assert batch["real"][row].tolist() == [True] * len(wanted) + [False] * (batch["bag"].shape[1] - len(wanted))
            assert not batch["bag"][row, len(wanted) :].any()
            assert batch["label"][row].tolist() == [[1, 0], [0, 1]][int(key[1:]) // 2 % 2]
        assert batch["bag"].shape[1] == max(len(of(key)) for key in batch["key"])
        assert batch["real"].any(1).all()  # no head averages over nothing, whatever is padded
    assert [len(batch["key"]) for batch in batches] == ([1] * 36 if size == 1 else [4, 4, 4, 4, 2] * 2)


@pytest.mark.parametrize("options", [{}, {"patches": 3}, {"patches": 3, "balance": True, "batch_size": 4}])
def test_any_number_of_workers_sees_the_same(folder: Path, options: dict[str, Any]) -> None:
    first, second = (
        [trace(b) for b in data(folder, epochs=2, workers=n, remember=1, **options).train_dataloader()] for n in (0, 2)
    )
    assert first == second


@pytest.mark.parametrize("size", [1, 4])
def test_two_ranks_share_an_epoch_without_repeats(folder: Path, size: int) -> None:
    whole = {b["key"][0]: trace(b) for b in data(folder, patches=3).train_dataloader()}
    ranks = [list(data(folder, rank=r, world=2, batch_size=size, patches=3).train_dataloader()) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    assert sorted(keys([*ranks[0], *ranks[1]])) == sorted(whole)
    if size == 1:  # the very patches, too
        assert all(trace(b)[1] == whole[b["key"][0]][1] for part in ranks for b in part)


def test_a_resume_amid_an_epoch_goes_on_in_the_same_line(folder: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "patches": 3, "balance": True, "batch_size": 2}
    whole = [trace(batch) for batch in data(folder, **options).train_dataloader()]
    first = data(folder, **options)
    batches = iter(first.train_dataloader())
    before = [trace(next(batches)) for _ in range(13)]
    state = json.loads(json.dumps(first.state_dict()))
    second = data(folder, workers=1, remember=1, **options)
    second.load_state_dict(state)
    assert before + [trace(batch) for batch in second.train_dataloader()] == whole
    for change in ({"seed": 2}, {"patches": 2}, {"fold": 1}, {"balance": False}):
        other = data(folder, **options | change)
        other.load_state_dict(state)
        with pytest.raises(UserError, match=r"^cannot resume: the checkpoint was trained on 18 bags"):
            other.train_dataloader()


def test_patches_are_drawn_evenly_and_anew(folder: Path) -> None:
    seen: Counter[bytes] = Counter()
    draws = Counter[str]()
    for batch in data(folder, epochs=60, patches=3, remember=1).train_dataloader():
        (key,) = batch["key"]
        assert batch["bag"].shape == (1, 3, 4)
        rows = [row.tobytes() for row in batch["bag"][0].numpy()]
        assert len(set(rows)) == 3 and set(rows) <= {row.tobytes() for row in of(key)}
        assert rows == [row.tobytes() for row in of(key) if row.tobytes() in rows]  # in their order
        seen.update(rows)
        draws[key] += 1
    longest = [key for key in draws if len(of(key)) == 7]
    counts = np.array([seen[row.tobytes()] for key in longest for row in of(key)])
    assert counts.min() > 60 * 3 / 7 - 20 and counts.max() < 60 * 3 / 7 + 20  # a binomial's sd is 3.8
    validation = list(data(folder, patches=3).val_dataloader()[0])
    assert all(batch["bag"].shape[1] == len(of(batch["key"][0])) for batch in validation)  # whole


def test_balanced_epochs_have_as_many_of_each_class() -> None:
    strata = np.array([0] * 90 + [1] * 8 + [2] * 3)
    order = BalancedOrder(strata, seed=0)
    lines = [order.ids(epoch) for epoch in range(30)]
    for line in lines:
        assert len(line) == len(order) == 101
        assert sorted(np.bincount(strata[line])) == [33, 34, 34]
        rare = np.bincount(line, minlength=101)[90:]
        assert set(rare[:8]) <= {4, 5} and set(rare[8:]) <= {11, 12}  # each about as often as the others of its class
    common = np.bincount(np.concatenate(lines), minlength=101)[:90]
    assert common.min() >= 3 and common.max() <= 20  # of 30 epochs with 34 of 90: 11 on average, sd of 2.7
    assert not np.array_equal(lines[0], lines[1])


def test_what_is_remembered_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Counter[str]()
    from medclip.data.bag_files import StoredBag

    read = StoredBag.read
    monkeypatch.setattr(StoredBag, "read", lambda bag, *rest: (opened.update([bag.slide]), read(bag, *rest))[1])
    for remember, times in ((1, 1), (0, 3)):
        opened.clear()
        made = data(folder, epochs=3, remember=remember)
        found = [trace(batch) for batch in made.train_dataloader()]
        assert set(opened.values()) == {times} and len(opened) == 18
    assert found == [trace(batch) for batch in data(folder, epochs=3, remember=1).train_dataloader()]


def test_half_precision_rounds_and_takes_half(folder: Path) -> None:
    cohort = open_cohort(features=str(folder), table=str(folder / "t.csv"))
    whole, half = (BagMemory.of(cohort.bags, 10**6, kind) for kind in ("float32", "float16"))
    assert half.values.nbytes * 2 == whole.values.nbytes == sum(b.patches for b in cohort.bags) * 4 * 4
    found = half.read(4, cohort.bags[4])
    assert found.dtype == np.float32 and np.array_equal(found, of("s04").astype(np.float16).astype(np.float32))
    tight = BagMemory.of(cohort.bags, 100)  # of 48, 64 and more bytes
    assert (tight.starts >= 0).sum() == 1 and np.array_equal(tight.read(4, cohort.bags[4]), of("s04"))


def test_bad_bags_are_counted_listed_and_limited(folder: Path) -> None:
    train = set(keys(list(data(folder).train_dataloader())))
    bad = sorted(train)[:2]
    for key in bad:
        broken = of(key)
        broken[1, 2] = np.nan
        write(folder / f"features_e/{key}.h5", broken)
    write(folder / "features_e/spare.h5", values(3, 4))
    batches = list(data(folder, batch_size=4, max_bad_fraction=0.2).train_dataloader())
    assert set(keys(batches)) == train - set(bad) and sum(batch["skipped"] for batch in batches) == 2
    rows = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert {row["key"]: row["reason"] for row in rows} == {
        **dict.fromkeys(bad, "not finite"),
        "spare": "not in the table",
    }
    with pytest.raises(UserError, match=r"2 of 18 samples are bad \(2 × not finite\)"):
        list(data(folder).train_dataloader())
    (folder / "features_e/s29.h5").unlink()
    (folder / "features_e/s28.h5").unlink()
    with pytest.raises(UserError, match=r"2 of 30 samples are bad \(2 × no features\)"):
        data(folder).train_dataloader()


def test_a_rank_without_a_bag_still_has_a_batch(folder: Path) -> None:
    last = [list(data(folder, rank=r, world=4).train_dataloader())[-1] for r in range(4)]  # 18 bags on 4 ranks
    assert [len(batch["key"]) for batch in last] == [1, 1, 0, 0]
    assert last[3]["bag"].shape == (1, 1, 4) and last[3]["real"].all() and last[3]["label"].shape == (1, 2)


def test_survival_has_times_events_and_the_bins_of_training(folder: Path) -> None:
    made = data(folder, target="survival", labels={"bins": 3}, batch_size=4)
    train = [made.cohort.bags[i] for i in made.parts["train"]]  # pyright: ignore
    events = [bag.truth.time for bag in train if bag.truth.event]
    assert made.edges == pytest.approx(np.quantile(events, [1 / 3, 2 / 3]))
    for batch in made.train_dataloader():
        for row, key in enumerate(batch["key"]):
            k = int(key[1:])
            assert (batch["time"][row], batch["event"][row]) == (k + 1, k % 3 > 0)
            assert int(batch["label"][row].argmax()) == np.digitize(k + 1, made.edges)  # pyright: ignore
    counts = made.label_counts()
    assert sum(there for there, _ in counts.values()) == len(train) and list(counts) == ["bin 1", "bin 2", "bin 3"]


def test_a_set_to_evaluate_is_the_test_part_with_places(folder: Path) -> None:
    made = data(folder, fold=2)
    held = BagSet(features=str(folder), table=str(folder / "t.csv"), fold=2)
    assert [bag.key for bag in held.bags] == [made.cohort.bags[i].key for i in made.parts["test"]]  # pyright: ignore
    (batches, more) = (list(held.batches(4, workers)) for workers in (0, 1))
    assert [trace(batch) for batch in batches] == [trace(batch) for batch in more]
    assert keys(batches) == [bag.key for bag in held.bags]
    for batch in batches:
        for row, (key, meta) in enumerate(zip(batch["key"], batch["meta"], strict=True)):
            n = len(of(key))
            assert np.array_equal(batch["bag"][row, :n].numpy(), of(key))
            assert batch["coords"][row].tolist() == [[256 * i, i] for i in range(n)] + [[-1, -1]] * (
                batch["coords"].shape[1] - n
            )
            assert (meta["slide"], meta["patient"], meta["group"], meta["side"]) == (
                key,
                *[f"p{int(key[1:]) // 2:02d}"] * 2,
                256,
            )
            assert meta["label"] == "xy"[int(key[1:]) // 2 % 2] and meta["raw"]["time"] == int(key[1:]) + 1
    assert len(BagSet(features=str(folder), table=str(folder / "t.csv"), part="all")) == N
    assert len(BagSet(features=str(folder), table=str(folder / "t.csv"), part="all", limit=7)) == 7
    with pytest.raises(UserError, match=r"data.part is 'tests'"):
        BagSet(features=str(folder), part="tests")


def test_a_set_says_which_bags_it_could_not_read(folder: Path) -> None:
    held = BagSet(features=str(folder), table=str(folder / "t.csv"))
    gone = held.bags[0].key
    (folder / f"features_e/{gone}.h5").write_bytes(b"")
    assert gone not in keys(list(held.batches())) and [one[:2] for one in held.bad] == [(gone, "read error")]
    for bag in held.bags:
        (folder / f"features_e/{bag.key}.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"^all 6 bags were skipped"):
        list(held.batches())


@pytest.mark.parametrize("target", ["classes", "ordinal", "multilabel", "survival"])
def test_generated_bags_come_as_they_were_made(target: str) -> None:
    recipe = BagRecipe(slides=48, patches=12, dim=3, rare=0.1, seed=3, target=target)
    held = BagSet(phantoms={"slides": 48, "patches": 12, "dim": 3, "rare": 0.1, "seed": 3}, target=target)
    made = {bag_row(recipe, i)["slide"]: i for i in range(48)}
    assert held.encoder == "phantom" and held.target == target
    for batch in held.batches():
        (meta,) = batch["meta"]
        bag = make_bag(recipe, made[batch["key"][0]])
        assert np.array_equal(batch["bag"][0].numpy(), bag.features)
        assert np.array_equal(batch["coords"][0].numpy(), bag.coords) and np.array_equal(meta["planted"], bag.planted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0: give a whole number, 1 or more"),
        ({"patches": 0}, "data.patches is 0"),
        ({"dtype": "bfloat16"}, "data.dtype is 'bfloat16'"),
        ({"remember": -1}, "data.remember is -1"),
        ({"max_bad_fraction": 2}, "data.max_bad_fraction is 2"),
        ({"target": "survival", "balance": True}, "target=survival has none"),
    ],
)
def test_bad_options_are_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BagData(**options, phantoms={})


def test_batches_makes_every_epoch_the_same_few(folder: Path) -> None:
    batches = list(data(folder, batches=3, batch_size=2, epochs=3).train_dataloader())
    assert [sorted(keys(batches[i : i + 3])) for i in (0, 3, 6)] == [sorted(keys(batches[:3]))] * 3
    assert len(batches) == 9 and torch.equal(batches[0]["bag"], batches[3]["bag"])
