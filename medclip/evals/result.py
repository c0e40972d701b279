"""What an evaluation gives back: outcomes sample by sample, for intervals and pairing, and material for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float

from medclip.evals.calibration import Bin, Reliability
from medclip.evals.mil_details import MilDetails
from medclip.evals.multilabel_curves import OperatingPoint
from medclip.evals.vqa_details import VqaDetails
from medclip.types import Batch, DualEncoder, Preprocess

Role = Literal["domain", "retention"]
Advance = Callable[[int], object]  # called with the number of samples just done

# CLIP_benchmark's names are the keys; this is how people read them. Other metrics are shown by their own names.
LABELS = {
    "acc1": "accuracy",
    "acc5": "top-5 accuracy",
    "mean_per_class_recall": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "macro AUROC",
    "mean_average_precision": "macro AUPRC",
    "brier": "Brier score",
    "closed_accuracy": "closed accuracy",
    "open_accuracy": "open accuracy",
    "kappa": "quadratic kappa",
    "cindex": "C-index",
    "attention_auroc": "attention AUROC in the region",
    "routing_accuracy": "closed told from open",
    "bleu1": "BLEU-1 of open answers",
    "bleu2": "BLEU-2 of open answers",
    "bleu3": "BLEU-3 of open answers",
    "bleu4": "BLEU-4 of open answers",
    "text_retrieval_recall@1": "image→text R@1",
    "text_retrieval_recall@5": "image→text R@5",
    "text_retrieval_recall@10": "image→text R@10",
    "text_retrieval_median_rank": "image→text median rank",
    "image_retrieval_recall@1": "text→image R@1",
    "image_retrieval_recall@5": "text→image R@5",
    "image_retrieval_recall@10": "text→image R@10",
    "image_retrieval_median_rank": "text→image median rank",
    "slide_to_slide_map": "slide→slide mAP",
    "slide_to_slide_mmv@5": "slide→slide mMV@5",
    "class_to_slide_map": "class→slide mAP",
    **{f"slide_to_slide_recall@{k}": f"slide→slide R@{k}" for k in (1, 3, 5)},
    **{f"text_to_slide_recall@{k}": f"text→slide R@{k}" for k in (1, 3, 5)},
    "median_over_prompts": "balanced accuracy, median over prompt draws",
    "lower_quartile_over_prompts": "balanced accuracy, lower quartile over prompt draws",
    "upper_quartile_over_prompts": "balanced accuracy, upper quartile over prompt draws",
    **{f"auroc_{pool}": f"macro AUROC {pool}" for pool in ("top-1", "top-5", "top-10", "top-50", "top-100", "mean")},
    "patch_auroc": "patch AUROC",
    "pixel_auroc": "pixel AUROC",
    "pooled_patch_auroc": "patch AUROC, all slides' patches together",
    "dice": "Dice",
    "best_dice": "Dice at the best threshold (a bound)",
}


class EvalData(Protocol):
    """A finite labelled or captioned set, as `medclip.data.evalset.EvalSet` gives it.

    `meta` of each real row holds `label` (str | None), `captions` (list[str]) and `group` (str).
    """

    @property
    def bad(self) -> Sequence[tuple[str, str, str]]: ...  # (key, reason, detail), complete after `batches`

    def __len__(self) -> int: ...

    def batches(self, preprocess: Preprocess, batch_size: int, workers: int) -> Iterable[Batch]: ...


class LabelledData(EvalData, Protocol):
    """A set for multi-label classification; its batches' `label` (b, c) has a column a class, NaN where unknown."""

    @property
    def classes(self) -> Sequence[str]: ...


class Outcomes(Protocol):
    """What happened to each sample, enough to compute every metric under any sample weights."""

    @property
    def keys(self) -> list[str]: ...

    @property
    def groups(self) -> list[str]: ...

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]: ...


@dataclass(frozen=True)
class PromptScore:
    """One template alone as the classifier."""

    template: str
    acc1: float
    mean_per_class_recall: float


@dataclass(frozen=True)
class Example:
    """A sample of a classification: its picture (JPEG), truth, and the most likely classes with their probability."""

    key: str
    thumbnail: bytes
    truth: str
    guesses: list[tuple[str, float]]


@dataclass(frozen=True)
class Confusion:
    """Samples of class `truth` that were taken for `said`: how many, and some of them, the surest first."""

    truth: str
    said: str
    count: int
    examples: list[Example]


@dataclass(frozen=True)
class Showcase:
    """Samples worth a look, the surest first: right ones, wrong ones, and those of the most frequent confusions."""

    right: list[Example]
    wrong: list[Example]
    confused: list[Confusion]


@dataclass(frozen=True)
class Hit:
    """One retrieved item: a caption or a picture (JPEG), its cosine, and whether it is the query's own."""

    text: str
    score: float
    own: bool
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Query:
    """A retrieval query and what came back; `thumbnail` is set when the query is an image."""

    text: str
    rank: int
    hits: list[Hit]
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class ClassificationDetails:
    """Tables of a classification. Class order is that of `classes` throughout; per-class values may be NaN."""

    classes: dict[str, list[str]]  # label -> names used in prompts
    templates: list[str]
    support: list[int]
    recall: list[float]
    f1: list[float]
    auroc: list[float]
    confusion: list[list[int]]  # row: truth, column: prediction
    prompts: list[PromptScore]
    examples: list[Example]
    showcase: Showcase | None = None


@dataclass(frozen=True)
class RetrievalDetails:
    """Sizes and the gallery of a retrieval."""

    images: int
    captions: int  # (image, caption) pairs
    distinct_captions: int
    image_queries: list[Query]
    text_queries: list[Query]


@dataclass(frozen=True)
class QuestionExample:
    """A closed question: the picture (JPEG), the options with their cosines, best first, and the right one."""

    key: str
    thumbnail: bytes
    question: str
    options: list[tuple[str, float]]
    answer: str


@dataclass(frozen=True)
class ClosedQuestionsDetails:
    """Sizes and examples of closed questions."""

    images: int
    kinds: dict[str, int]  # kind -> questions
    template: str
    examples: list[QuestionExample]


@dataclass(frozen=True)
class ShotRow:
    """One method with so many shots a class: balanced accuracy of each draw, and what there was to learn from."""

    method: str  # probe | tip
    shots: int
    samples: float  # mean over draws; under shots x classes where a class has fewer
    draws: list[float]
    mean: float
    sd: float  # over draws, n - 1; NaN of a single one


@dataclass(frozen=True)
class FewShotDetails:
    """Few-shot classification by method and number of shots, beside prompts alone."""

    classes: dict[str, list[str]]
    templates: list[str]
    zero_shot: float  # balanced accuracy
    rows: list[ShotRow]


@dataclass(frozen=True)
class Finding:
    """A picture (JPEG) that scores high for a class: its probability, and its label there (None: unknown).

    `peak` is the highest attention on it, 1 being an even share; None where there is none to show.
    """

    key: str
    thumbnail: bytes
    probability: float
    truth: bool | None
    peak: float | None


@dataclass(frozen=True)
class PairScore:
    """One pair of templates alone as the classifier."""

    positive: str
    negative: str
    auroc: list[float]  # of each class


@dataclass(frozen=True)
class ClassReport:
    """One class of a multi-label classification by one checkpoint; curves are empty where it is undefined."""

    name: str
    words: list[str]  # names used in prompts; empty for a classifier
    positives: int
    known: int  # samples with a label for it
    calibration_error: float
    brier: float
    roc: list[tuple[float, float]] = field(default_factory=list)  # false-positive rate, sensitivity
    reliability: list[Bin] = field(default_factory=list)
    operating_points: list[OperatingPoint] = field(default_factory=list)
    gallery: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class MultiLabelDetails:
    """Tables and drawings of a multi-label classification, in the order of the configured classes."""

    kind: Literal["classifier", "zero-shot"]
    classes: list[ClassReport]
    missing: list[str]  # configured classes that the checkpoint has none for
    validation: int  # samples that thresholds were chosen on; 0: the evaluated ones themselves
    pairs: list[PairScore]  # zero-shot only
    attention: bool  # whether the gallery's pictures show attention


Details = (
    ClassificationDetails
    | RetrievalDetails
    | MultiLabelDetails
    | ClosedQuestionsDetails
    | FewShotDetails
    | VqaDetails
    | MilDetails
)


@dataclass(frozen=True)
class Result:
    """One evaluation of one checkpoint."""

    task: str  # CLIP_benchmark's name of it
    role: Role
    headline: tuple[str, ...]  # the metrics that speak for this evaluation
    outcomes: Outcomes
    details: Details | None  # tables and pictures of the report
    chance: dict[str, float]
    skipped: dict[str, int]
    lower_is_better: frozenset[str] = frozenset()
    undefined: dict[str, list[str]] = field(default_factory=dict)  # metric -> classes left out of its average
    domain: str = ""  # pathology, radiology…: what averages over tasks are taken by
    source: str = ""  # "confirmed" where the set's classes and split were read at the source, else "unconfirmed"
    reliability: Reliability | None = None  # of a classification into classes that exclude each other

    @property
    def metrics(self) -> dict[str, float]:
        """The point values."""
        ones = np.ones((1, len(self.outcomes.keys)))
        return {name: float(value[0]) for name, value in self.outcomes.values(ones).items()}


class Evaluation(Protocol):
    """The one interface of evaluations: data and settings in the constructor, a checkpoint in the call."""

    name: str
    data: EvalData

    def __call__(self, clip: DualEncoder, *, batch_size: int, workers: int, advance: Advance) -> Result: ...
