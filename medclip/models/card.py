"""The model card of an exported folder: what it is, what it was trained on and grew from, what it reaches.

Written from what is known: the lineage in the checkpoint (`medclip.callbacks.lineage`), and the `results.json` of
`medclip evaluate` where that is given. Nothing is made up: what is not known is said to be not known. The front matter
is Hugging Face's (huggingface.co/docs/hub/model-cards; `model-index` holds the results).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from medclip.models.card_lineage import hub_datasets, origins, runs, table, training

# CLIP_benchmark's name -> how people read it; the first four that a task has are shown.
METRICS = {
    "acc1": "accuracy",
    "mean_per_class_recall": "balanced accuracy",
    "auroc": "macro AUROC",
    "mean_average_precision": "macro AUPRC",
    "text_retrieval_recall@1": "image→text R@1",
    "image_retrieval_recall@1": "text→image R@1",
    "text_retrieval_recall@10": "image→text R@10",
    "image_retrieval_recall@10": "text→image R@10",
}
_NONCOMMERCIAL = ("-nc", " nc", "noncommercial", "non-commercial")


@dataclass(frozen=True)
class About:
    """What a card tells beside the model itself.

    Args:
        title: the heading.
        notes: a paragraph: what the model was made from.
        licence: of the weights, as Hugging Face calls it ("cc-by-nc-4.0"); None: not stated.
        lineage: of the checkpoint, None where it has none.
        results: records of `results.json`, of all models.
        this: which of these the exported one is.
    """

    title: str
    notes: str = ""
    licence: str | None = None
    lineage: Mapping[str, Any] | None = None
    results: Sequence[Mapping[str, Any]] = ()
    this: str | None = None


def card(about: About, *, model: str, use: str, library: str, pipeline: str, purpose: str, scores: str) -> str:
    """The text of `README.md`.

    Args:
        about: what it tells.
        model: lines on the model's sizes and inputs.
        use: how it is loaded.
        library: that loads it, as Hugging Face calls it.
        pipeline: what it is for, as Hugging Face calls it.
        purpose: the same in words.
        scores: what comes out, in words.
    """
    parts = [
        f"---\n{front_matter(about, library, pipeline)}\n---",
        f"# {about.title}",
        about.notes,
        f"## Model\n\n{model}",
        f"## Use\n\n{use}",
        _intended(purpose, scores),
        *([_results(about)] if about.results else []),
        *(training(about.lineage) if about.lineage else [_NO_LINEAGE]),
        _licence(about),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


_NO_LINEAGE = "## Data\n\nNot known: the checkpoint says nothing of the data that it was trained on."


def front_matter(about: About, library: str, pipeline: str) -> str:
    """Hugging Face's metadata, in YAML."""
    results = [
        EvalResult(
            task_type=_task_type(record),
            dataset_type=str(record["dataset"]),
            dataset_name=str(record["dataset"]),
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=round(float(record["metrics"][metric]), 4),
        )
        for record in own_records(about)
        for metric in shown_metrics(record)
    ]
    bases = [str(parent["hub"]) for parent in origins(about.lineage) if parent.get("hub")]
    datasets = sorted({name for run in runs(about.lineage) for name in hub_datasets(run)})
    data = ModelCardData(
        license=about.licence,
        library_name=library,
        pipeline_tag=pipeline,
        tags=["medical", *(["clip"] if library == "open_clip" else [])],
        base_model=list(dict.fromkeys(bases)) or None,
        datasets=datasets or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=about.title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def own_records(about: About) -> list[Mapping[str, Any]]:
    """The records of this model."""
    return [record for record in about.results if record["model"] == about.this]


def shown_metrics(record: Mapping[str, Any]) -> list[str]:
    """Up to four metrics of a record that have a value."""
    return [name for name in METRICS if isinstance(record["metrics"].get(name), int | float)][:4]


def _task_type(record: Mapping[str, Any]) -> str:
    return "zero-shot-image-classification" if "retrieval" not in str(record["task"]) else "image-text-retrieval"


def _intended(purpose: str, scores: str) -> str:
    return f"""## Intended use and limits

For research on medical images: {purpose}. Not a medical device; not for diagnosis, triage or any decision about a
patient. Scores are {scores}, not probabilities of disease. What it reaches was measured on the sets named here only, if
any; other scanners, stains, populations and languages may differ, and biases of the data are the model's as well.
Validate on your own data before you rely on anything."""


def _results(about: About) -> str:
    names = list(dict.fromkeys(str(record["model"]) for record in about.results))
    header = ["task", "metric", *(f"**{name}** (this)" if name == about.this else name for name in names), "n"]
    rows = []
    for dataset in dict.fromkeys(str(record["dataset"]) for record in about.results):
        by_model = {str(r["model"]): r for r in about.results if str(r["dataset"]) == dataset}
        first = next(iter(by_model.values()))
        title = dataset if first.get("role", "domain") == "domain" else f"{dataset} ({first['role']})"
        for metric in shown_metrics(by_model.get(about.this or "", first)):
            cells = [_cell(by_model.get(name), metric) for name in names]
            rows.append([title, METRICS[metric], *cells, str(first.get("samples", ""))])
    level = next((r["made"]["bootstrap"]["level"] for r in about.results if "made" in r), 0.95)
    lines = (
        f"In brackets the bootstrap's {level:.0%} interval; ▲ better, ▼ worse than the first column on the same "
        "samples, beyond chance."
    )
    return f"## Results\n\n{table(header, rows)}\n\n{lines}"


def _cell(record: Mapping[str, Any] | None, metric: str) -> str:
    value = record["metrics"].get(metric) if record else None
    if record is None or value is None:
        return "–"
    text = f"{value:.3f}"
    low, high = (record.get("intervals") or {}).get(metric) or (None, None)
    if low is not None and high is not None:
        text += f" [{low:.3f}, {high:.3f}]"
    change = ((record.get("comparison") or {}).get("differences") or {}).get(metric)
    return text + (_mark(change) if isinstance(change, Mapping) else "")


def _mark(change: Mapping[str, Any]) -> str:
    return {"gain": " ▲", "loss": " ▼"}.get(str(change.get("verdict")), "")


def _licence(about: About) -> str:
    stated = f"Weights: {about.licence}." if about.licence else "Weights: no licence was stated."
    restricted = [
        str(source["name"]) for run in runs(about.lineage) for source in run["sources"] if _noncommercial(source)
    ]
    warning = (
        f" Part of the data ({', '.join(dict.fromkeys(restricted))}) is licensed for noncommercial use."
        if restricted
        else ""
    )
    return f"## Licence\n\n{stated}{warning} Licences of data and base models are as listed above."


def _noncommercial(source: Mapping[str, Any]) -> bool:
    texts = [*(source.get("licences") or {}), *filter(None, [source.get("licence")])]
    return any(word in f" {text}".lower() for text in texts for word in _NONCOMMERCIAL)
