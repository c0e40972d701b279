"""Multi-label classification on pictures of bands, where labels, logits and words are known."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from PIL import Image
from scipy.special import expit, logit

from medclip.evals.bootstrap import Bootstrap
from medclip.evals.compare import compare
from medclip.evals.multilabel import MultiLabel
from medclip.evals.multilabel_outcomes import MultiLabelOutcomes
from medclip.evals.result import MultiLabelDetails, Result
from medclip.evals.run import evaluate_checkpoint, run_evaluation
from medclip.evals.zeroshot import ZeroShotClassification
from medclip.types import UserError
from tests.evals.eval_toys import ColourSet
from tests.evals.thorax_toys import FINDINGS, BandClassifier, FindingClip, FindingSet

SETTINGS = Bootstrap(samples=200)


def thorax(data: FindingSet | None = None, **settings: object) -> MultiLabel:
    return MultiLabel(data or FindingSet(), name="thorax", **settings)  # type: ignore[arg-type]


def parts(result: Result) -> tuple[MultiLabelOutcomes, MultiLabelDetails]:
    assert isinstance(result.outcomes, MultiLabelOutcomes) and isinstance(result.details, MultiLabelDetails)
    return result.outcomes, result.details


@pytest.mark.parametrize("model", [BandClassifier(0.6), FindingClip(0.6)], ids=["classifier", "clip"])
def test_metrics_equal_scikit_learn_on_the_known_labels(model: torch.nn.Module) -> None:
    data = FindingSet(60, unknown=0.2)
    result = thorax(data)(model, batch_size=16)  # type: ignore[arg-type]
    outcomes, details = parts(result)
    truth = np.stack([row[2] for row in data.rows])
    usable = ~np.isnan(truth).all(axis=1)
    assert np.array_equal(outcomes.labels, truth[usable], equal_nan=True) and np.isnan(truth).mean() > 0.1
    areas, precisions, squares = [], [], []
    for c, own in enumerate(details.classes):
        known = ~np.isnan(outcomes.labels[:, c])
        labels, odds = outcomes.labels[known, c], outcomes.log_odds[known, c]
        areas.append(sk.roc_auc_score(labels, odds))
        precisions.append(sk.average_precision_score(labels, odds))
        squares.append(sk.brier_score_loss(labels, expit(odds)))
        assert (own.positives, own.known) == (labels.sum(), known.sum())
        assert own.brier == pytest.approx(squares[-1], abs=1e-12)
        assert result.metrics[f"auroc:{own.name}"] == pytest.approx(areas[-1], abs=1e-12)
        assert result.metrics[f"average_precision:{own.name}"] == pytest.approx(precisions[-1], abs=1e-12)
        assert result.chance[f"average_precision:{own.name}"] == pytest.approx(labels.mean())
        assert result.chance[f"auroc:{own.name}"] == 0.5
    assert result.metrics["auroc"] == pytest.approx(np.mean(areas), abs=1e-12) and 0.6 < np.mean(areas) < 0.995
    assert result.metrics["mean_average_precision"] == pytest.approx(np.mean(precisions), abs=1e-12)
    assert result.metrics["brier"] == pytest.approx(np.mean(squares), abs=1e-12)


def test_a_classifier_is_fed_real_rows_alone_and_its_logits_are_kept() -> None:
    data, model = FindingSet(5, unlabelled=4), BandClassifier()
    outcomes, details = parts(result := thorax(data)(model, batch_size=8))
    fed = sum(~np.isnan(row[2]).all() for row in data.rows)
    assert model.seen == fed + 9 == len(outcomes.keys) + 9  # and three pictures of each class, in vain: no attention
    images = torch.from_numpy(np.stack([row[1] for row in data.rows[:fed]]))
    np.testing.assert_allclose(outcomes.log_odds, model({"image": images}).detach().numpy(), rtol=1e-6)
    assert result.skipped == {"broken image": 2, "no label": len(data.rows) - fed}
    assert details.kind == "classifier" and details.pairs == [] and not details.attention


def test_zero_shot_asks_presence_against_absence() -> None:
    right = thorax(prompts=[["{}", "no {}"]])(FindingClip(), batch_size=8).metrics
    wrong = thorax(prompts=[["without {}", "{}"]])(FindingClip(), batch_size=8).metrics
    assert right["auroc"] > 0.9 and wrong["auroc"] == pytest.approx(1 - right["auroc"])
    outcomes, details = parts(thorax(prompts=[["{}", "no {}"], ["no {}", "{}"]])(FindingClip(), batch_size=8))
    mean = [np.mean(pair.auroc) for pair in details.pairs]
    assert mean == pytest.approx([right["auroc"], 1 - right["auroc"]])  # the spread shows what the ensemble hides
    assert np.abs(outcomes.log_odds).max() < 1e-9


def test_synonyms_are_used_in_prompts_and_to_find_a_classifiers_class() -> None:
    classes = {"Effusion": "effusion", "Lung_Nodule": ["coin lesion", "lung nodule"], "Edema": ["edema"]}
    model = BandClassifier()
    model.description["classes"] = ["EFFUSION", "coin_lesion", "hernia"]
    outcomes, _ = parts(thorax(classes=classes)(model))
    assert outcomes.missing == ["Edema"]
    assert np.array_equal(outcomes.log_odds[:, :2], parts(thorax()(BandClassifier()))[0].log_odds[:, :2])
    _, details = parts(thorax(classes=classes)(FindingClip()))
    assert [own.words for own in details.classes] == [["effusion"], ["coin lesion", "lung nodule"], ["edema"]]


def test_classes_may_be_some_of_the_datas_in_another_order() -> None:
    data = FindingSet(30)
    some = thorax(data, classes={"Edema": "edema", "Effusion": "effusion"})(BandClassifier(), batch_size=16)
    full = thorax(data)(BandClassifier(), batch_size=16)
    assert list(parts(some)[0].classes) == ["Edema", "Effusion"]
    for name in ("Edema", "Effusion"):
        assert some.metrics[f"auroc:{name}"] == pytest.approx(full.metrics[f"auroc:{name}"], abs=0.02)
        assert some.metrics[f"auroc:{name}"] > 0.8


def test_missing_classes_are_named_and_left_out_for_every_checkpoint() -> None:
    evaluation = thorax(FindingSet(30))
    full, part = evaluation(BandClassifier(0.5)), evaluation(BandClassifier(0.8, FINDINGS[:2]))
    assert parts(part)[1].missing == ["Edema"] and parts(full)[1].missing == []
    comparison = compare("thorax", {"full": full, "part": part}, SETTINGS)
    row = next(row for row in comparison.rows if row.metric == "auroc")
    own = {m: [comparison.results[m].metrics[f"auroc:{c}"] for c in FINDINGS[:2]] for m in ("full", "part")}
    assert row.estimates["full"].value == pytest.approx(np.mean(own["full"])) != full.metrics["auroc"]
    assert row.estimates["part"].value == pytest.approx(np.mean(own["part"]))
    prevalence = np.nanmean(parts(full)[0].labels[:, :2], axis=0).mean()
    assert comparison.any_result.chance["mean_average_precision"] == pytest.approx(prevalence)
    edema = comparison.by_class["Edema"][0]
    assert edema.estimates["full"].value > 0.5 and np.isnan(edema.estimates["part"].value)
    assert np.isnan(edema.differences["part"].value) and edema.differences["part"].verdict == "no change beyond chance"


def test_a_class_of_one_value_is_named_and_no_zero_in_the_mean() -> None:
    data = FindingSet(30, unknown=0)
    for _, _, label, _ in data.rows:
        label[1] = 0
    result = thorax(data)(BandClassifier(0.7), batch_size=16)
    assert result.undefined["auroc"] == ["Lung_Nodule"] and np.isnan(result.metrics["auroc:Lung_Nodule"])
    both = [result.metrics[f"auroc:{name}"] for name in ("Effusion", "Edema")]
    assert result.metrics["auroc"] == pytest.approx(np.mean(both))
    own = parts(result)[1].classes[1]
    assert own.roc == own.operating_points == [] and own.positives == 0 and own.known == 90


def test_a_resample_without_a_positive_leaves_the_class_out_of_that_mean() -> None:
    outcomes, _ = parts(thorax(FindingSet(30, unknown=0))(BandClassifier(0.7)))
    weights = np.stack([np.ones(90), (outcomes.labels[:, 0] == 0).astype(float)])
    found = outcomes.values(weights)
    assert np.isnan(found["auroc:Effusion"]).tolist() == [False, True]
    for row, names in enumerate((FINDINGS, FINDINGS[1:])):
        assert found["auroc"][row] == pytest.approx(np.mean([found[f"auroc:{name}"][row] for name in names]))


def test_checkpoints_are_paired_by_patient() -> None:
    models = {"random": BandClassifier(0.0), "clip": FindingClip(0.5), "trained": BandClassifier(0.9)}
    report = run_evaluation(models, {"thorax": thorax(FindingSet(40))}, settings=SETTINGS)  # type: ignore[arg-type]
    comparison = report.comparisons["thorax"]
    assert comparison.groups == 40
    row = comparison.headline[0]
    assert row.metric == "auroc" and row.differences["trained"].verdict == "gain"
    assert row.estimates["random"].low < 0.5 < row.estimates["random"].high
    for name, rows in comparison.by_class.items():
        assert rows[0].differences["trained"].low > 0, name
    assert [r.metric for r in comparison.overall] == ["auroc", "mean_average_precision", "brier"]
    brier = comparison.overall[2]
    assert brier.lower_is_better and brier.differences["trained"].verdict == "gain"


def test_thresholds_come_from_validation_where_it_is_given() -> None:
    data, validation = FindingSet(30), FindingSet(50, seed=1)
    own = parts(thorax(data)(BandClassifier(0.6)))
    fair = parts(thorax(data, validation=validation)(BandClassifier(0.6)))
    there = parts(thorax(validation)(BandClassifier(0.6)))
    assert own[1].validation == 0 and fair[1].validation == len(there[0].keys)
    for c in range(3):
        chosen = [point.threshold for point in fair[1].classes[c].operating_points]
        assert chosen == [point.threshold for point in there[1].classes[c].operating_points]
        for rule, point in enumerate(fair[1].classes[c].operating_points):
            called = fair[0].log_odds[:, c] >= logit(point.threshold) - 1e-9
            assert point.tp == (called & (fair[0].labels[:, c] == 1)).sum()
            best = own[1].classes[c].operating_points[rule]
            if rule == 0:
                assert best.sensitivity + best.specificity >= point.sensitivity + point.specificity
            else:
                assert best.sensitivity >= 0.9
    assert np.array_equal(own[0].log_odds, fair[0].log_odds)


def test_a_patient_in_both_sets_is_refused_without_naming_him() -> None:
    with pytest.raises(UserError, match=r"12 groups \(patients\) of evals.thorax.validation") as error:
        thorax(FindingSet(30), validation=FindingSet(12))(BandClassifier())
    assert "0:3" not in str(error.value) and "\n" not in str(error.value)


def test_the_gallery_shows_the_highest_scores_with_their_truth() -> None:
    data = FindingSet(40)
    outcomes, details = parts(thorax(data)(BandClassifier(0.6), batch_size=7))
    for c, own in enumerate(details.classes):
        best = np.argsort(-outcomes.log_odds[:, c], kind="stable")[:3]
        assert [found.key for found in own.gallery] == [outcomes.keys[i] for i in best]
        for found, i in zip(own.gallery, best, strict=True):
            label = outcomes.labels[i, c]
            assert found.truth == (None if np.isnan(label) else bool(label))
            assert found.probability == pytest.approx(expit(outcomes.log_odds[i, c]))
            row = next(row for row in data.rows if row[0] == found.key)
            picture = np.asarray(Image.open(BytesIO(found.thumbnail)).convert("L"), dtype=float)
            assert picture.shape == (168, 168) and picture.mean() == pytest.approx(row[1].mean(), abs=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": {}}, r"evals\.thorax\.classes at least one class"),
        ({"classes": {"Edema": []}}, r"each with a name"),
        ({"classes": {"Hernia": "hernia"}}, r"evals.thorax.data has no labels of 'Hernia' \(it has 'Effusion'"),
        ({"validation": FindingSet(3, classes=FINDINGS[:2])}, r"evals.thorax.validation has no labels of 'Edema'"),
        ({"prompts": []}, "prompts is empty"),
        ({"data": ColourSet(3)}, r"evals.thorax.data has no labels: say evals.thorax.data.labels"),
    ],
)
def test_settings_that_leave_nothing_to_ask_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        thorax(**settings)
    assert "\n" not in str(error.value)


def test_what_cannot_be_evaluated_is_said() -> None:
    with pytest.raises(UserError, match=r"nothing to evaluate \(2 broken image, 5 no label\): mend evals.thorax.data"):
        thorax(FindingSet(0, unlabelled=5))(BandClassifier())
    with pytest.raises(UserError, match=r"mend evals.thorax.validation"):
        thorax(validation=FindingSet(0, unlabelled=5))(BandClassifier())
    other = BandClassifier()
    other.description["classes"] = ["cat", "dog"]
    with pytest.raises(UserError, match="the classifier knows 'cat', 'dog', but the evaluation asks for 'Effusion'"):
        thorax()(other)
    broken = BandClassifier()
    torch.nn.init.constant_(broken.scale, float("nan"))
    with pytest.raises(UserError, match="answers NaN"):
        thorax()(broken)


def test_a_classifier_has_no_words_for_other_evaluations() -> None:
    evals = {"thorax": thorax(), "colours": ZeroShotClassification(ColourSet(), name="colours")}
    model = BandClassifier()
    with pytest.raises(UserError, match="'colours' is for CLIPs, but this checkpoint is a classifier"):
        evaluate_checkpoint(model, evals)
    assert model.seen == 0  # before anything was computed


def test_other_labels_cannot_be_paired() -> None:
    one = thorax(FindingSet(10))(BandClassifier())
    outcomes, _ = parts(one)
    other = replace(one, outcomes=replace(outcomes, keys=outcomes.keys[::-1]))
    with pytest.raises(UserError, match="other samples"):
        compare("thorax", {"a": one, "b": other}, SETTINGS)
