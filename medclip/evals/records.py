"""`results.json` and `suites.json`; NaN is written as null.

The first holds CLIP_benchmark's records (dataset, model, pretrained, task, metrics, language), and what they lack.
Added keys: role, domain, source, samples, groups, intervals, chance, undefined, skipped, comparison to the base,
per-class and per-prompt tables, operating points, and how it was made. `balanced accuracy` is CLIP_benchmark's
`mean_per_class_recall`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from medclip.evals.compare import Comparison, MetricRow
from medclip.evals.mil_details import MilDetails
from medclip.evals.result import (
    ClassificationDetails,
    ClassReport,
    ClosedQuestionsDetails,
    FewShotDetails,
    MultiLabelDetails,
    Result,
    RetrievalDetails,
)
from medclip.evals.run import Report
from medclip.evals.slide import SlideDetails
from medclip.evals.suite import SuiteResult
from medclip.evals.vqa_controls import controls
from medclip.evals.vqa_details import VqaDetails


def records(report: Report) -> list[dict[str, Any]]:
    """One record a checkpoint and evaluation."""
    return [
        _record(report, comparison, model, result)
        for comparison in report.comparisons.values()
        for model, result in comparison.results.items()
    ]


def to_json(report: Report) -> str:
    """The text of `results.json`."""
    return _json(records(report))


def suites_json(suites: Mapping[str, SuiteResult]) -> str:
    """The text of `suites.json`."""
    return _json({name: asdict(own) for name, own in suites.items()})


def _record(report: Report, comparison: Comparison, model: str, result: Result) -> dict[str, Any]:
    rows = {row.metric: row for row in comparison.overall}
    metrics: dict[str, float | None] = {metric: row.estimates[model].value for metric, row in rows.items()}
    if result.task == "zeroshot_classification":
        metrics.setdefault("acc5", None)  # CLIP_benchmark's readers look for it
    record: dict[str, Any] = {
        "dataset": comparison.name,
        "model": model,
        "pretrained": report.checkpoints[model],
        "task": result.task,
        "metrics": metrics,
        "language": "en",
        "role": result.role,
        "domain": result.domain,
        "source": result.source,
        "samples": comparison.samples,
        "groups": comparison.groups,
        "intervals": {k: [row.estimates[model].low, row.estimates[model].high] for k, row in rows.items()},
        "chance": result.chance,
        "undefined": result.undefined,
        "skipped": result.skipped,
    }
    if model != report.base:
        changes = {metric: asdict(row.differences[model]) for metric, row in rows.items()}
        record["comparison"] = {"base": report.base, "differences": changes}
    details = result.details
    if isinstance(details, ClassificationDetails):
        record["classnames"] = details.classes
        record["templates"] = details.templates
        names = list(details.classes)
        columns = zip(names, details.support, details.recall, details.f1, details.auroc, strict=True)
        record["per_class"] = {n: {"support": s, "recall": r, "f1": f, "auroc": a} for n, s, r, f, a in columns}
        record["confusion"] = details.confusion
        record["prompts"] = [asdict(p) for p in details.prompts]
        if isinstance(details, SlideDetails):
            record |= {"pool": details.pool, "smooth": details.smoothing, "draws": [asdict(d) for d in details.draws]}
    elif isinstance(details, MultiLabelDetails):
        record["kind"] = details.kind
        record["missing"] = details.missing
        record["thresholds_from"] = (
            f"{details.validation} validation samples" if details.validation else "these samples"
        )
        record["prompts"] = [asdict(pair) for pair in details.pairs]
        record["per_class"] = {
            own.name: _class_record(own, comparison.by_class[own.name], model) for own in details.classes
        }
    elif isinstance(details, ClosedQuestionsDetails):
        record["images"] = details.images
        record["template"] = details.template
        record["per_kind"] = {
            kind: {"questions": count} | _kind_record(comparison, kind, model) for kind, count in details.kinds.items()
        }
    elif isinstance(details, FewShotDetails):
        record["classnames"] = details.classes
        record["templates"] = details.templates
        record["shots"] = [asdict(row) for row in details.rows]
    elif isinstance(details, VqaDetails):
        record |= _vqa_record(report, comparison, model, details)
    elif isinstance(details, MilDetails):
        record |= _mil_record(comparison, model, details)
    elif isinstance(details, RetrievalDetails):
        record["images"] = details.images
        record["captions"] = details.captions
        record["distinct_captions"] = details.distinct_captions
    if result.reliability is not None:
        record["reliability"] = asdict(result.reliability)
    record["made"] = {"created": report.created, "bootstrap": asdict(report.settings), "versions": report.versions}
    return record


def _vqa_record(report: Report, comparison: Comparison, model: str, details: VqaDetails) -> dict[str, Any]:
    """Sizes, accuracies of parts, and what is left without the right image."""
    without = controls(comparison, report.settings.level)[model]
    parts: dict[str, dict[str, Any]] = {}
    for part in details.parts:
        own = {"questions": part.questions} | _kind_record(comparison, part.label, model)
        parts.setdefault(f"per_{part.of}", {})[part.name] = own
    return {
        "images": details.images,
        "questions": details.questions,
        "answers": details.answers,
        "unknown": details.unknown,
        "majority": {"of": details.majority_of} | details.majority,
        "controls": {
            control: {
                metric: {
                    "value": left.estimate.value,
                    "interval": [left.estimate.low, left.estimate.high],
                    "image_adds": asdict(left.added),
                }
                for metric, left in found.items()
            }
            for control, found in without.items()
        },
    } | parts


def _mil_record(comparison: Comparison, model: str, details: MilDetails) -> dict[str, Any]:
    """Sizes, classes, folds and curves of slides."""
    plain = ("target", "slides", "patients", "patches", "events", "regions", "confusion")
    classes: dict[str, Any] = {}
    for name, support in zip(details.classes, details.support, strict=True):
        classes[name] = {"slides": support}
        for row in comparison.by_class.get(name, []):
            own = row.estimates[model]
            value = {"value": own.value, "interval": [own.low, own.high], "chance": row.chance}
            classes[name][row.metric.partition(":")[0]] = value
    return {key: getattr(details, key) for key in plain} | {
        "per_class": classes,
        "folds": [asdict(row) for row in details.folds],
        "curves": [asdict(curve) for curve in details.curves],
    }


def _kind_record(comparison: Comparison, kind: str, model: str) -> dict[str, Any]:
    """Accuracy over one kind of question; a single kind is the whole, and has no rows of its own."""
    rows = comparison.by_class.get(kind) or comparison.overall
    own = rows[0].estimates[model]
    return {"acc1": {"value": own.value, "interval": [own.low, own.high], "chance": rows[0].chance}}


def _class_record(own: ClassReport, rows: list[MetricRow], model: str) -> dict[str, Any]:
    record: dict[str, Any] = {"positives": own.positives, "known": own.known, "words": own.words}
    for row in rows:
        metric, estimate = row.metric.partition(":")[0], row.estimates[model]
        record[metric] = {"value": estimate.value, "interval": [estimate.low, estimate.high], "chance": row.chance}
        if model in row.differences:
            record[metric]["difference"] = asdict(row.differences[model])
    ratios = ("sensitivity", "specificity", "ppv", "npv")
    return record | {
        "calibration_error": own.calibration_error,
        "brier": own.brier,
        "reliability": [asdict(b) for b in own.reliability],
        "operating_points": [asdict(p) | {name: getattr(p, name) for name in ratios} for p in own.operating_points],
    }


def _json(value: Any) -> str:
    return json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
