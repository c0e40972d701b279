"""The table of a cohort of slides and the files of its features, joined: bags, and what had to be left out.

Columns are found by their usual names (CLAM's table: slide_id and case_id) or named in the config. Nothing is guessed
of patients: without a column of them the config must say that each slide is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medclip.data.bad import BadSample
from medclip.data.bag_files import BagFile, GeneratedBag, find_bags, open_bag
from medclip.data.bag_targets import Target, Truth
from medclip.data.filters import Filter, lookup
from medclip.data.ledger import Bad
from medclip.data.shards import parse_json
from medclip.data.tables import table_rows
from medclip.phantoms.bags import BagRecipe, bag_row
from medclip.types import UserError

USUAL = {
    "slide": ("slide", "slide_id", "slide_name", "image_id", "wsi", "filename"),
    "patient": ("patient", "patient_id", "case_id", "case", "case_submitter_id", "subject_id"),
}


@dataclass(frozen=True)
class Bag:
    """One bag: a slide, or all slides of a patient.

    Args:
        key: slide, or patient.
        patient: whose it is.
        files: of features, whose rows follow one another.
        truth: what is to be told of it.
        row: of the table; of the first slide where there are several.
    """

    key: str
    patient: str
    files: tuple[BagFile, ...]
    truth: Truth
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        return sum(file.patches for file in self.files)

    @property
    def dim(self) -> int:
        return self.files[0].dim


@dataclass(frozen=True)
class Cohort:
    """All bags that can be used.

    Args:
        bags: in the table's order.
        target: how truth was read.
        dim: width of the features.
        encoder: that made them, where the files say it.
        bad: (slide, reason, detail) of rows of the table that cannot be used.
        unlabelled: slides that have features and are not in the table.
        rows: of the table, after the filter.
    """

    bags: list[Bag]
    target: Target
    dim: int
    encoder: str | None
    bad: list[Bad]
    unlabelled: list[str]
    rows: int


def open_cohort(
    *,
    features: str | Sequence[str] | None = None,
    table: str | None = None,
    phantoms: Mapping[str, Any] | None = None,
    target: str = "classes",
    labels: Mapping[str, Any] | None = None,
    columns: Mapping[str, str | None] | None = None,
    filter: str | None = None,
    label_of: str = "slide",
    bag: str = "slide",
    dim: int | None = None,
    encoder: str | None = None,
) -> Cohort:
    """Read the table, and the headers of the features.

    Args:
        features: folder of features, or several; see `bag_files.find_bags`.
        table: a row a slide; None: index.parquet beside the features.
        phantoms: generated bags instead of both, see `phantoms.bags.BagRecipe`.
        target: classes, ordinal, multilabel or survival.
        labels: how truth is read, see `bag_targets.Target`; without `names` they are the table's.
        columns: {slide, patient}: which columns these are, where their names are not the usual ones.
        filter: expression on the columns.
        label_of: slide, or patient: all slides of a patient must then have the same truth.
        bag: slide, or patient: all slides of a patient are one bag.
        dim: width that features must have; None: what most have.
        encoder: that must have made them; None: any one, and files that name none are taken.

    Raises:
        UserError: an unknown key, no such column, a label that splits a patient, or nothing that can be used.
    """
    for name, value in {"label_of": label_of, "bag": bag}.items():
        if value not in ("slide", "patient"):
            raise UserError(f"data.{name} is {value!r}: choose slide or patient")
    labels = dict(labels or {})
    given = {key: labels[key] for key in ("field", "values", "separator", "thresholds", "bins") if key in labels}
    if not labels.get("names"):
        from medclip.data.bag_targets import class_names

        labels["names"] = class_names(
            features, table, phantoms, target, **{k: v for k, v in given.items() if v is not None}
        )
    rule = Target.parse(target, labels)
    files: dict[str, Path | GeneratedBag]
    if phantoms is not None:
        recipe = BagRecipe.parse(phantoms)
        if recipe.target != target:
            recipe = replace(recipe, target=target) if "target" not in phantoms else recipe
        if recipe.target != target:
            raise UserError(f"data.phantoms.target is {recipe.target}, data.target {target}: leave the first out")
        rows: list[dict[str, Any]] = [bag_row(recipe, i) for i in range(recipe.slides)]
        files = {row["slide"]: GeneratedBag(recipe, i) for i, row in enumerate(rows)}
    else:
        if features is None:
            raise UserError("data.features is not set: name the folder of features that `medclip extract` wrote")
        files = dict(find_bags(features))
        rows = table_of(features, table, {*rule.columns(), *(columns or {}).values()} - {None})  # type: ignore[arg-type]
    of_slide, of_patient = (_column(rows, name, (columns or {}).get(name)) for name in ("slide", "patient"))
    for name in rule.columns():
        if not any(lookup(row, name) is not None for row in rows):
            raise UserError(f"data.table has no column {name!r}, or nothing in it ({_there(rows)}): see data.labels")
    if filter is not None:
        keep = Filter(filter)
        rows = [row for row in rows if keep(row)]
        if not rows:
            raise UserError(f"data.filter={filter!r} leaves no slide: mend it, or leave it out")
    found, bad = _joined(rows, files, rule, of_slide, of_patient)
    listed = {key for one in rows for key in file_names(str(lookup(one, of_slide)))}
    unlabelled = [slide for slide in files if slide not in listed]
    found, worse, dim, encoder = _alike(found, dim, encoder)
    bad += worse
    if not found:
        why = "; ".join(f"{count} × {reason}" for reason, count in Counter(one[1] for one in bad).most_common(3))
        first = f", e.g. {bad[0][0]}: {bad[0][2]}" if bad else ""
        raise UserError(f"no slide of data.table can be used ({why}{first}): mend data.table or data.features")
    if label_of == "patient" or bag == "patient":
        _same_of_patient(found, "data.bag=patient" if bag == "patient" else "data.label_of=patient")
    if bag == "patient":
        found = _by_patient(found)
    return Cohort(found, rule, dim, encoder, bad, unlabelled, len(rows))


def table_of(features: str | Sequence[str] | None, table: str | None, texts: set[str]) -> list[dict[str, Any]]:
    """Rows of the table, or of the index.parquet that lies beside features.

    Args:
        features: where the index is.
        table: a path; None for the index.
        texts: columns that stay as they are written.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    if table is None:
        if features is None:
            raise UserError("data.features is not set: name the folder of features that `medclip extract` wrote")
        folders = {path.parent for path in find_bags(features).values()}
        indices = [one / "index.parquet" for folder in sorted(folders) for one in (folder, folder.parent)]
        paths = [path for path in indices if path.is_file()]
        if not paths:
            raise UserError("data.table is not set: give a CSV with the columns slide, patient and label")
    else:
        paths = [Path(table).expanduser()]
    names = {*texts, *(name for usual in USUAL.values() for name in usual)}
    rows: list[dict[str, Any]] = []
    for path in paths:
        for number, raw in enumerate(table_rows(path, None, names), 1):
            try:
                rows.append(parse_json(raw))
            except BadSample as error:
                raise UserError(f"data.table {path}, row {number}: {error}: mend it") from None
    if not rows:
        raise UserError(f"data.table {paths[0]} has no row: check that it is not empty")
    return rows


def _column(rows: Sequence[Mapping[str, Any]], role: str, given: str | None) -> str:
    usual = (given,) if given is not None else USUAL[role]
    for name in usual:
        if any(lookup(row, name) not in (None, "") for row in rows):
            return name
    hint = "=slide, where each slide is a patient of its own" if role == "patient" else "=COLUMN"
    raise UserError(
        f"data.table has no column {' or '.join(map(repr, usual[:3]))} of the {role} ({_there(rows)}): say "
        f"data.columns.{role}{hint}"
    )


def _there(rows: Sequence[Mapping[str, Any]]) -> str:
    return "it has " + ", ".join(map(str, list(rows[0])[:12]))


def file_names(slide: str) -> tuple[str, str]:
    """What the file of a slide may be called: tables may name slides with the ending of their picture."""
    return slide, Path(slide).stem


def _joined(
    rows: Sequence[Mapping[str, Any]],
    files: Mapping[str, Path | GeneratedBag],
    rule: Target,
    of_slide: str,
    of_patient: str,
) -> tuple[list[Bag], list[Bad]]:
    found: dict[str, Bag] = {}
    bad: list[Bad] = []
    for number, row in enumerate(rows, 1):
        slide, patient = (lookup(row, name) for name in (of_slide, of_patient))
        if slide in (None, ""):
            bad.append((f"row {number}", "no slide", f"{of_slide} is empty"))
            continue
        slide = str(slide)
        try:
            if patient in (None, ""):
                raise BadSample("no patient", f"{of_patient} is empty")
            truth = rule.of(row)
            name = next((name for name in file_names(slide) if name in files), None)
            if name is None:
                raise BadSample("no features", f"no file of features is called {slide}")
            place = files[name]
            file = open_bag(place) if isinstance(place, Path) else place
            if file.patches == 0:
                raise BadSample("no patches", f"the features of {slide} have no row")
        except BadSample as error:
            bad.append((slide, error.reason, error.detail))
            continue
        if name in found:
            if found[name].truth.same(truth) and found[name].patient == str(patient):
                continue
            raise UserError(f"data.table has slide {slide} twice, and says different things of it: mend row {number}")
        found[name] = Bag(name, str(patient), (file,), truth, row)
    return list(found.values()), bad


def _alike(bags: list[Bag], dim: int | None, encoder: str | None) -> tuple[list[Bag], list[Bad], int, str | None]:
    """Bags of one width and one encoder; what most have, where nothing is said."""
    bad: list[Bad] = []
    weights: list[tuple[str, int]] = []
    if bags:
        dim = dim or Counter(bag.dim for bag in bags).most_common(1)[0][0]
        named = Counter(bag.files[0].encoder for bag in bags if bag.files[0].encoder is not None)
        encoder = encoder or (named.most_common(1)[0][0] if named else None)
        said = (bag.files[0].weights for bag in bags if bag.files[0].encoder == encoder)
        weights = Counter(text for text in said if text).most_common(1)
    good: list[Bag] = []
    for bag in bags:
        file = bag.files[0]
        if file.dim != dim:
            bad.append((bag.key, "other width", f"its features have {file.dim} columns, not {dim}"))
        elif file.encoder is not None and file.encoder != encoder:
            bad.append((bag.key, "other encoder", f"its features are of {file.encoder}, not {encoder}"))
        elif file.weights and file.weights != weights[0][0]:
            bad.append((bag.key, "other encoder", f"its features are of other weights of {encoder} than the others'"))
        else:
            good.append(bag)
    return good, bad, dim or 0, encoder


def _same_of_patient(bags: Sequence[Bag], why: str) -> None:
    first: dict[str, Bag] = {}
    for bag in bags:
        other = first.setdefault(bag.patient, bag)
        if not other.truth.same(bag.truth):
            raise UserError(
                f"{why}, but slides {other.key} and {bag.key} of patient {bag.patient} have different labels: mend "
                "data.table, or say data.label_of=slide data.bag=slide"
            )


def _by_patient(bags: Sequence[Bag]) -> list[Bag]:
    groups: dict[str, list[Bag]] = {}
    for bag in bags:
        groups.setdefault(bag.patient, []).append(bag)
    return [
        Bag(patient, patient, tuple(file for bag in group for file in bag.files), group[0].truth, group[0].row)
        for patient, group in groups.items()
    ]
