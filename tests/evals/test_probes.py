"""Linear probe and few shots: equal to plain scikit-learn, and no sample of one part in another."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from medclip.evals import few_shot, linear_probe
from medclip.evals.classification import ClassificationOutcomes
from medclip.evals.few_shot import FewShot, FewShotOutcomes, draw
from medclip.evals.linear_probe import STRENGTHS, LinearProbe, choose_strength
from medclip.evals.probe_sets import Labelled, hold_out
from medclip.evals.result import FewShotDetails
from medclip.evals.run import run_evaluation
from medclip.evaluate import main, sets_of
from medclip.types import UserError
from tests.evals.eval_toys import COLOURS, ColourClip, ColourSet

MUTE = {"red": "a", "green": "of", "blue": "picture"}  # names that say nothing of the colours


def probe(data: Any, **settings: Any) -> LinearProbe:
    return LinearProbe(data, name="colours", **settings)


def shots(data: Any, **settings: Any) -> FewShot:
    return FewShot(data, name="colours", **{"classes": MUTE, "shots": [1, 4], "draws": 3} | settings)


def other(patients: int = 20, seed: int = 5) -> ColourSet:
    """A set of other patients."""
    data = ColourSet(patients=patients, seed=seed)
    for _, _, meta in data.rows:
        meta["group"] = f"other {meta['group']}"
    return data


def rows_of(data: ColourSet, clip: ColourClip) -> Labelled:
    images = torch.from_numpy(np.stack([pixels for _, pixels, _ in data.rows]))
    labels = np.array([sorted(COLOURS).index(meta["label"]) for _, _, meta in data.rows])
    return Labelled(clip.encode_image(images).double().numpy(), labels, [meta["group"] for _, _, meta in data.rows])


def test_the_probe_is_plain_scikit_learn_at_the_chosen_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Labelled, float]] = []

    def spy(train: Labelled, validation: Labelled, classes: int) -> float:
        found = choose_strength(train, validation, classes)
        seen.append((train.join(validation), found))
        return found

    monkeypatch.setattr(linear_probe, "choose_strength", spy)
    clip, data, train = ColourClip(0.45), ColourSet(patients=25), other(30)
    result = probe(data, train=train)(clip, batch_size=16)
    ((learnt, strength),) = seen
    every, judged = rows_of(train, clip), rows_of(data, clip)
    assert sorted(map(tuple, learnt.features)) == sorted(map(tuple, every.features))  # all of them, held out or not
    want = LogisticRegression(C=strength, max_iter=1000).fit(learnt.features, learnt.labels)
    assert isinstance(result.outcomes, ClassificationOutcomes)
    found = softmax(result.outcomes.logits, axis=1)
    np.testing.assert_allclose(found, want.predict_proba(judged.features), rtol=0, atol=1e-12)
    assert result.metrics["acc1"] == pytest.approx(want.score(judged.features, judged.labels), abs=1e-12)
    balanced = sk.balanced_accuracy_score(judged.labels, want.predict(judged.features))
    assert result.metrics["mean_per_class_recall"] == pytest.approx(balanced, abs=1e-12)
    assert 0.4 < balanced < 0.99 and result.task == "linear_probe"
    assert result.reliability is not None and result.reliability.accuracy == result.metrics["acc1"]
    assert result.reliability.temperature is None


def test_two_classes_have_scikit_learns_probabilities() -> None:
    rng = np.random.default_rng(0)
    train = Labelled(rng.normal(size=(30, 4)), np.arange(30) % 2, [str(i) for i in range(30)])
    fitted = linear_probe.fit(train, 0.3)
    found = softmax(linear_probe.logits(fitted, train.features, 2), axis=1)
    np.testing.assert_allclose(found, fitted.predict_proba(train.features), atol=1e-12)


def test_the_strength_is_chosen_on_validation_samples_to_an_eighth_of_a_decade() -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(size=(12, 3))

    def part(n: int, noise: float) -> Labelled:
        x = rng.normal(size=(n, 12))
        return Labelled(x, (x @ truth + noise * rng.normal(size=(n, 3))).argmax(1), [str(i) for i in range(n)])

    train, validation = part(60, 6.0), part(400, 0.0)
    found = choose_strength(train, validation, 3)
    place = int(np.flatnonzero(np.isclose(STRENGTHS, found))[0])

    def score(at: int) -> float:
        fitted = LogisticRegression(C=STRENGTHS[at], max_iter=1000).fit(train.features, train.labels)
        return float(sk.balanced_accuracy_score(validation.labels, fitted.predict(validation.features)))

    own = score(place)
    assert own >= max(score(at) for at in range(0, len(STRENGTHS), 16)) - 1e-12
    assert own >= max(score(place - 1), score(place + 1)) - 1e-12
    assert STRENGTHS[0] == pytest.approx(1e-6) and STRENGTHS[-1] == pytest.approx(1e6) and len(STRENGTHS) == 97
    # Of equal accuracies the least cross-entropy: of separable samples, the weakest penalty.
    easy = Labelled(np.eye(3)[[0, 1, 2] * 5], np.array([0, 1, 2] * 5), [str(i) for i in range(15)])
    assert choose_strength(easy, easy, 3) > 1e4


def test_one_set_is_cut_by_group_the_same_way_for_every_checkpoint() -> None:
    data = ColourSet(patients=30, unlabelled=2)
    results = [probe(data)(ColourClip(skill), batch_size=16).outcomes for skill in (0.2, 0.9)]
    assert results[0].keys == results[1].keys and results[0].groups == results[1].groups
    everyone = Counter(meta["group"] for _, _, meta in data.rows)
    judged = Counter(results[0].groups)
    assert 10 < len(judged) < 20
    assert all(everyone[group] == count for group, count in judged.items())  # whole groups


def test_held_out_groups_are_whole_and_classes_keep_their_share() -> None:
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in rng.integers(0, 60, 600)]
    labels = rng.choice(3, 600, p=[0.7, 0.2, 0.1])
    held = hold_out(labels, groups, 4, seed=1)
    assert not set(np.array(groups)[held]) & set(np.array(groups)[~held])
    shares = np.bincount(labels[held], minlength=3) / np.bincount(labels)
    assert np.all(np.abs(shares - 0.25) < 0.1)
    assert (hold_out(labels, groups, 4, seed=1) == held).all() and (hold_out(labels, groups, 4, seed=2) != held).any()


def test_the_probe_sees_no_judged_label(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, data, train = ColourClip(0.3), ColourSet(patients=15), other()
    fair = probe(data, train=train)(clip, batch_size=16).outcomes
    for _, _, meta in data.rows:
        meta["label"] = "red"
    same = probe(data, train=train)(clip, batch_size=16).outcomes
    assert isinstance(fair, ClassificationOutcomes) and isinstance(same, ClassificationOutcomes)
    np.testing.assert_array_equal(fair.logits, same.logits)


@pytest.mark.parametrize("kind", [probe, shots])
@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_group_in_two_sets_is_refused(kind: Any, part: str) -> None:
    with pytest.raises(UserError, match=rf"20 groups.*evals.colours.data and evals.colours.{part}"):
        kind(ColourSet(patients=20), **{part: ColourSet(patients=20, seed=5)})(ColourClip())


@pytest.mark.parametrize("kind", [probe, shots])
def test_sets_without_groups_may_number_their_samples_alike(kind: Any) -> None:
    data, train = ColourSet(patients=20), ColourSet(patients=20, seed=5)
    for own in (data, train):
        for i, (key, _, meta) in enumerate(own.rows):
            meta["group"] = f"{i}:{key}"
    assert len(kind(data, train=train)(ColourClip(), batch_size=16).outcomes.keys) == 60


@pytest.mark.parametrize("kind", [probe, shots])
def test_what_cannot_be_learnt_is_named(kind: Any) -> None:
    train = other()
    train.rows = [row for row in train.rows if row[2]["label"] != "blue"]
    with pytest.raises(UserError, match=r"nothing to learn 'blue' from"):
        kind(ColourSet(), train=train)(ColourClip())
    with pytest.raises(UserError, match=r"evals\.colours\.(validation|train)"):
        kind(ColourSet(patients=1))(ColourClip())
    train.rows = []
    with pytest.raises(UserError, match=r"mend evals\.colours\.train"):
        kind(ColourSet(), train=train)(ColourClip())


def test_few_shots_share_no_group_between_shots_validation_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Labelled, Labelled, Labelled]] = []
    honest = few_shot._answers

    def spy(*parts: Any) -> Any:
        seen.append(parts[:3])
        return honest(*parts)

    monkeypatch.setattr(few_shot, "_answers", spy)
    data, train = ColourSet(patients=15), other(40)
    for skill in (0.4, 0.8):
        shots(data, train=train, shots=[1, 2, 8])(ColourClip(skill), batch_size=16)
    first, second = seen[:9], seen[9:]
    for (own, chosen, judged), (again, also, _), k in zip(first, second, [1, 2, 8] * 3, strict=True):
        assert own.groups == again.groups and chosen.groups == also.groups  # whatever the checkpoint
        assert not set(own.groups) & set(chosen.groups)
        assert not (set(own.groups) | set(chosen.groups)) & set(judged.groups)
        assert np.bincount(own.labels).tolist() == [k] * 3
        assert np.bincount(chosen.labels).tolist() == [min(k, 4)] * 3
        for label in range(3):
            assert len(set(np.array(own.groups)[own.labels == label])) == k  # there are patients enough
    assert len({tuple(own.groups) for own, _, _ in first}) == 9


def test_shots_take_a_second_image_of_a_group_only_when_all_have_given_one() -> None:
    groups = ["a", "a", "a", "b", "b", "c", "z", "z"]
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    picks = {k: draw(labels, groups, k, np.random.default_rng(7)).tolist() for k in (1, 3, 4, 5, 9)}
    of = {k: Counter(groups[i] for i in picks[k] if labels[i] == 0) for k in picks}
    assert of[3] == {"a": 1, "b": 1, "c": 1}
    assert sorted(of[4].values()) == [1, 1, 2] and of[5] == {"a": 2, "b": 2, "c": 1}
    assert sorted(picks[9]) == list(range(8))  # all there are
    for fewer, more in ((1, 3), (3, 4), (4, 5)):
        assert set(picks[fewer]) <= set(picks[more])


def test_few_shot_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    said = rng.integers(0, 3, (4, 90))
    said[:, ::2] = labels[::2]
    outcomes = FewShotOutcomes(
        list("k" * 90), list("g" * 90), labels, {"x": said[:3] == labels, "y": said[3:] == labels}
    )
    weights = rng.integers(0, 4, (2, 90)).astype(float)
    found = outcomes.values(weights)
    for row, w in enumerate(weights):
        scores = [sk.recall_score(labels, own, average=None, sample_weight=w).mean() for own in said]
        assert found["x"][row] == pytest.approx(np.mean(scores[:3]), abs=1e-12)
        assert found["y"][row] == pytest.approx(scores[3], abs=1e-12)


def test_shots_help_where_prompts_say_nothing_and_more_help_more() -> None:
    data, train = ColourSet(patients=40), other(60)
    result = shots(data, train=train, shots=[1, 8])(ColourClip(0.55), batch_size=32)
    details, metrics = result.details, result.metrics
    assert isinstance(details, FewShotDetails)
    assert 0.2 < details.zero_shot < 0.5
    for method in ("probe", "tip"):
        one, eight = (next(r for r in details.rows if (r.method, r.shots) == (method, k)) for k in (1, 8))
        assert eight.mean > one.mean > details.zero_shot + 0.05
        assert eight.mean == pytest.approx(metrics[f"{method}_balanced_accuracy@8"], abs=1e-12)
        assert eight.sd == pytest.approx(np.std(eight.draws, ddof=1)) and len(eight.draws) == 3
        assert (one.samples, eight.samples) == (3, 24)
    assert result.headline[0] == "zeroshot_balanced_accuracy" and set(result.headline) <= set(metrics)


@pytest.mark.parametrize("settings", [{"shots": []}, {"shots": [0]}, {"draws": 0}, {"templates": []}, {"classes": {}}])
def test_settings_that_leave_nothing_to_do_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"evals\.colours"):
        shots(ColourSet(), **settings)


def test_each_image_is_embedded_once_and_all_sets_are_listed() -> None:
    clip, data, train = ColourClip(0.5), ColourSet(patients=20), other(30)
    evals = {"lp": probe(data, train=train), "fs": shots(data, train=train)}
    report = run_evaluation({"a": clip, "b": ColourClip(0.9)}, evals, batch_size=16)  # pyright: ignore[reportArgumentType]
    assert clip.images == 60 + 90
    assert (
        report.comparisons["fs"].rows[0].differences["b"].low <= report.comparisons["fs"].rows[0].differences["b"].high
    )
    assert list(sets_of(evals))[:2] == ["lp", "fs"] and "lp (train)" in sets_of(evals)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["linear_probe", "few_shot"])
def test_the_shipped_config_runs_on_a_folder(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label, colour in COLOURS.items():
        for i in range(12):
            shade = np.clip(np.array(colour)[::-1] + rng.integers(-30, 30), 0, 255)
            (tmp_path / label).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / label / f"p{i}.png"), np.full((32, 32, 3), shade, np.uint8))
    arguments = [
        f"eval=[{name}]",
        f"evals.{name}.data.sources=[{{folder: {tmp_path}, caption: false}}]",
        "checkpoint=0.8",
        "load._target_=tests.evals.eval_toys.load_colour_clip",
        "bootstrap.samples=100",
        f"output={tmp_path}/out",
        "workers=0",
    ]
    if name == "few_shot":
        arguments += ["evals.few_shot.shots=[1,2]", "evals.few_shot.draws=2"]
    monkeypatch.setattr(sys, "argv", ["medclip evaluate", *arguments])
    main()
    (record,) = json.loads((tmp_path / "out/results.json").read_text())
    assert record["task"] == name and record["samples"] == 18
    if name == "linear_probe":
        assert record["metrics"]["acc1"] > 0.8
        assert sum(b["count"] for b in record["reliability"]["bins"]) == 18
    else:
        assert [(r["method"], r["shots"]) for r in record["shots"]] == [
            ("probe", 1), ("probe", 2), ("tip", 1), ("tip", 2)
        ]  # fmt: skip
