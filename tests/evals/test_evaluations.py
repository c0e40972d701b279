"""Zero-shot and retrieval on coloured squares, where the right answer is known."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from PIL import Image
from scipy.special import logsumexp, softmax
from torchmetrics.functional.retrieval import retrieval_hit_rate

from medclip.evals.calibration import reliability
from medclip.evals.classification import ClassificationOutcomes
from medclip.evals.result import ClassificationDetails, RetrievalDetails
from medclip.evals.retrieval import Retrieval, RetrievalOutcomes
from medclip.evals.run import evaluate_checkpoint
from medclip.evals.zeroshot import ZeroShotClassification
from medclip.types import UserError
from tests.evals.eval_toys import COLOURS, ColourClip, ColourSet

CLASSES = {"red": ["red", "crimson"], "green": "green", "blue": "blue"}
TEMPLATES = ["a {c} square", "picture of {c}"]


def zero_shot(data: object, **settings: object) -> ZeroShotClassification:
    return ZeroShotClassification(data, name="colours", **{"classes": CLASSES, "templates": TEMPLATES} | settings)  # type: ignore[arg-type]


def test_zero_shot_of_a_model_that_knows_colours() -> None:
    result = zero_shot(ColourSet(unlabelled=4))(ColourClip(), batch_size=8)
    assert result.metrics == {"acc1": 1.0, "mean_per_class_recall": 1.0, "macro_f1": 1.0, "auroc": 1.0}
    assert result.skipped == {"broken image": 2, "no label": 4}
    assert isinstance(result.details, ClassificationDetails)
    assert len(result.outcomes.keys) == 36 == sum(result.details.support)
    assert len(set(result.outcomes.groups)) == 12
    assert np.array_equal(np.diag(np.diag(result.details.confusion)), result.details.confusion)
    assert {e.truth for e in result.details.examples} <= set(COLOURS)
    picture = Image.open(BytesIO(result.details.examples[0].thumbnail))
    assert max(COLOURS, key=lambda c: -np.abs(np.array(picture).mean((0, 1)) - COLOURS[c]).sum()) == (
        result.details.examples[0].truth
    )


def test_zero_shot_of_a_poor_model_equals_scikit_learn() -> None:
    result = zero_shot(ColourSet(patients=30))(ColourClip(0.35), batch_size=16)
    outcomes = result.outcomes
    assert isinstance(outcomes, ClassificationOutcomes)
    truth = [list(CLASSES)[i] for i in outcomes.labels]
    said = [list(CLASSES)[i] for i in outcomes.logits.argmax(axis=1)]
    logits = outcomes.logits
    odds = [logits[:, k] - logsumexp(np.delete(logits, k, axis=1), axis=1) for k in range(3)]
    assert 0.4 < result.metrics["acc1"] < 0.98  # neither trivial
    assert result.metrics["acc1"] == pytest.approx(sk.accuracy_score(truth, said), abs=1e-12)
    assert result.metrics["macro_f1"] == pytest.approx(sk.f1_score(truth, said, average="macro"), abs=1e-12)
    want = np.mean([sk.roc_auc_score(outcomes.labels == k, odds[k]) for k in range(3)])
    assert result.metrics["auroc"] == pytest.approx(want, abs=1e-12)


def test_prompts_that_say_nothing_show_in_the_spread() -> None:
    result = zero_shot(ColourSet(), templates=["a {c} square", "dark{c}"])(ColourClip(), batch_size=8)
    assert isinstance(result.details, ClassificationDetails)
    good, bad = result.details.prompts
    assert good.mean_per_class_recall == 1
    assert bad.mean_per_class_recall == pytest.approx(
        1 / 3
    )  # unknown words: one prompt for all, always the first class


def test_labels_that_are_no_class_are_named_with_what_is_configured() -> None:
    with pytest.raises(UserError) as error:
        zero_shot(ColourSet(), classes={"Red": "red", "green": "green"})(ColourClip())
    message = str(error.value)
    assert "'blue', 'red'" in message and "'Red', 'green'" in message and "evals.colours.classes" in message
    assert "\n" not in message


def test_a_class_without_samples_is_named_undefined() -> None:
    result = zero_shot(ColourSet(), classes={**CLASSES, "dark": "dark"})(ColourClip(), batch_size=8)
    assert result.undefined == {"mean_per_class_recall": ["dark"], "macro_f1": ["dark"], "auroc": ["dark"]}
    assert result.metrics["auroc"] == 1.0


def test_without_classes_the_labels_are_their_own_names() -> None:
    result = zero_shot(ColourSet(), classes=None)(ColourClip(), batch_size=8)
    assert isinstance(result.details, ClassificationDetails)
    assert list(result.details.classes) == ["blue", "green", "red"]
    assert result.metrics["acc1"] == 1.0


@pytest.mark.parametrize("settings", [{"classes": {}}, {"classes": {"red": []}}, {"templates": []}])
def test_settings_that_leave_nothing_to_ask_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"evals\.colours"):
        zero_shot(ColourSet(), **settings)


@pytest.mark.parametrize("kind", [zero_shot, lambda data: Retrieval(data, name="colours")])
def test_an_empty_set_is_a_plain_message(kind) -> None:
    with pytest.raises(UserError, match=r"nothing to evaluate \(2 broken image, 3 no \w+\): mend evals.colours.data"):
        kind(ColourSet(patients=0, unlabelled=3))(ColourClip())


def test_retrieval_by_definition() -> None:
    data, clip = ColourSet(patients=10, unlabelled=1), ColourClip(0.6)
    result = Retrieval(data, name="colours")(clip, batch_size=7)
    outcomes = result.outcomes
    assert isinstance(outcomes, RetrievalOutcomes) and isinstance(result.details, RetrievalDetails)
    rows = [row for row in data.rows if row[2]["captions"]]
    texts = list(dict.fromkeys(c for _, _, meta in rows for c in meta["captions"]))
    image = clip.encode_image(torch.from_numpy(np.stack([pixels for _, pixels, _ in rows])))
    similarity = (image @ clip.encode_text(clip.tokenizer(texts)).T).numpy()
    for i, (_, _, meta) in enumerate(rows):
        own = [texts.index(c) for c in meta["captions"]]
        others = np.delete(similarity[i], own)
        assert outcomes.text_rank[i] == 1 + (others >= similarity[i, own].max()).sum()
    for pair, (i, caption) in enumerate(
        (i, c) for i, (_, _, meta) in enumerate(rows) for c in sorted(meta["captions"], key=texts.index)
    ):
        bearers = [j for j, (_, _, meta) in enumerate(rows) if caption in meta["captions"]]
        column = similarity[:, texts.index(caption)]
        assert outcomes.bearer[pair] == i
        assert outcomes.image_rank[pair] == 1 + (np.delete(column, bearers) >= column[bearers].max()).sum()
    assert result.metrics["text_retrieval_recall@5"] == np.mean(outcomes.text_rank <= 5)
    assert result.metrics["image_retrieval_median_rank"] == np.median(outcomes.image_rank)
    assert (result.details.images, result.details.captions) == (30, 60)
    assert result.details.distinct_captions == len(texts) < 60  # captions are shared
    assert result.skipped["no captions"] == 1


class Untied(ColourClip):
    """No two captions are alike: of equal scores the own item counts as the last, which torchmetrics leaves open."""

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        tilt = torch.sin(text.double() @ torch.arange(1.0, 9.0).double()[:, None] * torch.tensor([1.0, 2.0, 3.0]))
        return torch.nn.functional.normalize(super().encode_text(text) + 0.1 * tilt.float(), dim=-1)


def test_recall_at_k_is_torchmetrics_hit_rate() -> None:
    data, clip = ColourSet(patients=10), Untied(0.6)
    for _, _, meta in data.rows:
        meta["captions"] = meta["captions"][:1]  # the other one holds words that the toy does not know
    metrics = Retrieval(data, name="colours")(clip, batch_size=7).metrics
    texts = list(dict.fromkeys(c for _, _, meta in data.rows for c in meta["captions"]))
    image = clip.encode_image(torch.from_numpy(np.stack([pixels for _, pixels, _ in data.rows])))
    scores = image @ clip.encode_text(clip.tokenizer(texts)).T
    own = torch.tensor([[text in meta["captions"] for text in texts] for _, _, meta in data.rows])
    for k in (1, 5):
        hits = [float(retrieval_hit_rate(row, truth, top_k=k)) for row, truth in zip(scores, own, strict=True)]
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert 0.05 < metrics["text_retrieval_recall@1"] < 0.9


def test_retrieval_gallery_marks_the_own_items() -> None:
    result = Retrieval(ColourSet(), name="colours")(ColourClip(), batch_size=8)
    assert isinstance(result.details, RetrievalDetails)
    for query in result.details.image_queries + result.details.text_queries:
        owned = [place for place, hit in enumerate(query.hits, 1) if hit.own]
        assert all(a.score >= b.score for a, b in zip(query.hits, query.hits[1:], strict=False))
        assert (min(owned) >= 1 if owned else query.rank > 1) and (query.rank > 1 or owned)


def test_evaluations_of_one_checkpoint_share_embeddings() -> None:
    clip = ColourClip()
    seen: list[tuple[str, int, int]] = []
    evals = {"zero": zero_shot(ColourSet()), "retrieval": Retrieval(ColourSet(), name="retrieval")}
    results = evaluate_checkpoint(clip, evals, batch_size=8, on_progress=lambda *step: seen.append(step))
    assert clip.images == 36
    assert seen[0] == ("zero", 0, 36) and seen[-1] == ("retrieval", 36, 36)
    alone = Retrieval(ColourSet(), name="retrieval")(ColourClip(), batch_size=5)
    assert results["retrieval"].metrics == alone.metrics


def test_calibration_is_at_the_models_own_temperature() -> None:
    clip = ColourClip(0.35)
    usual = zero_shot(ColourSet(patients=30))(clip, batch_size=16)
    outcomes = usual.outcomes
    assert isinstance(outcomes, ClassificationOutcomes) and usual.reliability is not None
    assert usual.reliability == reliability(softmax(outcomes.logits, axis=1), outcomes.labels, 100.0)
    clip.logit_scale = torch.tensor(10.0).log()  # pyright: ignore[reportAttributeAccessIssue]
    own = evaluate_checkpoint(clip, {"own": zero_shot(ColourSet(patients=30))}, batch_size=16)["own"]
    assert own.metrics == usual.metrics  # none of which depends on it
    assert own.reliability is not None and own.reliability.temperature == pytest.approx(10)
    want = np.mean(softmax(outcomes.logits / 10, axis=1).max(axis=1))
    assert own.reliability.confidence == pytest.approx(want, abs=1e-6) and want < usual.reliability.confidence
