"""Run evaluations on checkpoints and gather everything into one `Report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from medclip.evals.bootstrap import Bootstrap
from medclip.evals.compare import Comparison, compare
from medclip.evals.result import Evaluation, Result
from medclip.evals.suite import Suite, SuiteResult, suite_result
from medclip.infer.memory import Precision, Remembering
from medclip.infer.mil import BagModel
from medclip.infer.scorers import Classifier
from medclip.infer.vqa import Answerer
from medclip.types import DualEncoder, UserError

OnProgress = Callable[[str, int, int], object]  # evaluation, samples done, samples in all
Model = DualEncoder | Classifier | Answerer | BagModel
Kind = Literal["clip", "classifier", "vqa", "mil"]
_KINDS: dict[Kind, str] = {"clip": "CLIP", "classifier": "classifier", "vqa": "VQA model", "mil": "slide model"}


@dataclass(frozen=True)
class Report:
    """All evaluations of all checkpoints; what `write_report` writes."""

    checkpoints: dict[str, str]  # name -> where it came from; the first is the base
    comparisons: dict[str, Comparison]
    settings: Bootstrap
    created: str
    versions: dict[str, str]
    suites: dict[str, SuiteResult] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return next(iter(self.checkpoints))

    def role(self, role: str) -> list[Comparison]:
        return [c for c in self.comparisons.values() if c.any_result.role == role]


def evaluate_checkpoint(
    clip: Model,
    evals: Mapping[str, Evaluation],
    *,
    batch_size: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
    on_progress: OnProgress = lambda name, done, total: None,
) -> dict[str, Result]:
    """Every evaluation of one checkpoint; the same image or text is embedded once for all of them.

    With `precision` "bf16" a CLIP's towers run under autocast.

    Raises:
        UserError: a checkpoint of a kind that an evaluation does not take.
    """
    kind = kind_of(clip)
    for name, evaluation in evals.items():
        takes: Sequence[Kind] = getattr(evaluation, "takes", ("clip",))
        if kind not in takes:
            raise UserError(
                f"evaluation {name!r} is for {' and '.join(f'{_KINDS[k]}s' for k in takes)}, but this checkpoint is a "
                f"{_KINDS[kind]}: leave one of them out"
            )
    remembering = Remembering(clip, precision, images=len(evals) > 1) if isinstance(clip, DualEncoder) else clip
    results = {}
    for name, evaluation in evals.items():
        done, total = 0, len(evaluation.data)
        on_progress(name, 0, total)

        def advance(count: int, name: str = name, total: int = total) -> None:
            nonlocal done
            done += count
            on_progress(name, done, total)

        results[name] = evaluation(
            remembering,  # pyright: ignore[reportArgumentType]  # only kinds that it takes
            batch_size=batch_size,
            workers=workers,
            advance=advance,
        )
        on_progress(name, total, total)
    return results


def kind_of(model: Model) -> Kind:
    """What evaluations tell models apart by; one that does not say which it takes (`takes`) takes CLIPs."""
    if isinstance(model, Answerer):
        return "vqa"
    if isinstance(model, BagModel):
        return "mil"
    return "clip" if isinstance(model, DualEncoder) else "classifier"


def make_report(
    results: Mapping[str, Mapping[str, Result]],
    *,
    settings: Bootstrap | None = None,
    sources: Mapping[str, str] | None = None,
    suites: Sequence[Suite] = (),
) -> Report:
    """Compare `results[checkpoint][evaluation]`, base first; `sources` says where each checkpoint came from.

    `suites` are averaged over those of their tasks that `results` has.

    Raises:
        UserError: nothing was evaluated.
    """
    settings = settings or Bootstrap()
    if not results or not next(iter(results.values())):
        raise UserError("nothing to report: no checkpoint or no evaluation was given")
    names = next(iter(results.values()))
    comparisons = {n: compare(n, {model: own[n] for model, own in results.items()}, settings) for n in names}
    return Report(
        checkpoints={model: (sources or {}).get(model, model) for model in results},
        comparisons=comparisons,
        settings=settings,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={package: _version(package) for package in ("medclip-adapt", "torch", "open_clip_torch", "numpy")},
        suites={suite.name: suite_result(suite, comparisons, settings) for suite in suites},
    )


def run_evaluation(
    clips: Mapping[str, Model],
    evals: Mapping[str, Evaluation],
    *,
    batch_size: int = 64,
    workers: int = 0,
    settings: Bootstrap | None = None,
    sources: Mapping[str, str] | None = None,
    on_progress: OnProgress = lambda name, done, total: None,
) -> Report:
    """Evaluate models already in memory, base first, and compare them."""
    results = {
        model: evaluate_checkpoint(clip, evals, batch_size=batch_size, workers=workers, on_progress=on_progress)
        for model, clip in clips.items()
    }
    return make_report(results, settings=settings, sources=sources)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
