"""Which samples of a source are in: filter, split by group, keep-list, a few; all by number, none by reading images.

Reading the metadata of millions of samples takes long, so the result is kept on disk under the source's fingerprint.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medclip.data.bad import BadSample
from medclip.data.filters import Filter, has_field, lookup
from medclip.data.index import fingerprint, load_arrays, save_arrays
from medclip.data.progress import track
from medclip.data.raw import Source
from medclip.types import UserError

if TYPE_CHECKING:
    from medclip.data.labels import LabelRule

_log = logging.getLogger(__name__)
_STEP = 512  # samples a thread takes at a time
_LOOK = 50  # samples looked at before a field counts as missing
_UNREAD = -2
_MOST_CLASSES = 61  # one bit each of an answer, and one for "none of them"


def apply_filter(source: Source, text: str, folder: Path) -> Source:
    """The samples for which the expression holds.

    Raises:
        UserError: a bad expression, a field that no sample has, or nothing is left.
    """
    keep = Filter(text)

    def judge(fields: Mapping[str, Any]) -> int:
        # Bit 0: stays; then one bit for every name that this sample has.
        return keep(fields) | sum(2 << n for n, name in enumerate(sorted(keep.names)) if has_field(fields, name))

    verdicts = _kept(source, f"filter {keep.text}", folder, judge)
    for number, name in enumerate(sorted(keep.names)):
        if not np.any((verdicts >= 0) & (verdicts & (2 << number) > 0)):
            raise UserError(f"filter of source {source.name}: no sample has the field {name!r}; {there_are(source)}")
    mask = (verdicts >= 0) & (verdicts & 1 == 1)
    if not mask.any():
        raise UserError(
            f"source {source.name} is empty: none of its {len(source)} samples passes the filter {keep.text!r} "
            f"({_first_has(source, sorted(keep.names))}): mend it, or leave it out"
        )
    return source.select(mask)


def apply_split(source: Source, config: Mapping[str, Any], folder: Path) -> Source:
    """One part of a split in which no group is in two parts.

    The part is a hash of the group's value alone, so it does not change when samples are added or reordered; the share
    of groups is therefore `fraction` only on average.

    Args:
        source: to split.
        config: {by: field of the group (or `key`), part: train | test, fraction: of the groups in `test`, seed}.
        folder: where the result is kept.

    Raises:
        UserError: an unknown option, no such field, or an empty part.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"split is {config!r}: write {{by: FIELD, part: train | test, fraction: 0.2, seed: 0}}")
    if unknown := set(config) - {"by", "part", "fraction", "seed"}:
        raise UserError(f"split has unknown keys {sorted(unknown)}: use by, part, fraction and seed")
    by, part = config.get("by", "key"), config.get("part", "train")
    try:
        fraction, seed = float(config.get("fraction", 0.2)), int(config.get("seed", 0))
    except (TypeError, ValueError):
        raise UserError(f"split {dict(config)}: fraction and seed must be numbers") from None
    if part not in ("train", "test") or not 0 < fraction < 1:
        raise UserError(f"split {dict(config)}: part is train or test, fraction between 0 and 1")

    def place(fields: Mapping[str, Any]) -> int:
        # 0: no such field; else where the group's hash falls, from 1 on.
        value = lookup(fields, by)
        return 0 if value is None else 1 + _hash(f"{seed}:{value}")

    places = _kept(source, f"split {by} {seed}", folder, place)
    if count := int((places == 0).sum()):
        raise UserError(
            f"split of source {source.name}: {count} of {len(source)} samples have no {by!r}; {there_are(source)}"
        )
    test = places - 1 < fraction * 2.0**62
    mask = (places > 0) & (test if part == "test" else ~test)
    if not mask.any():
        raise UserError(
            f"source {source.name} is empty: none of its {len(source)} samples falls into part {part} by {by!r}: "
            "change its fraction or seed"
        )
    return source.select(mask)


def group_hashes(source: Source, by: str, folder: Path, *, option: str = "group") -> np.ndarray:
    """int64 (n,): 62 bits of a hash of each sample's group; -1 where its metadata could not be read.

    Args:
        source: whose samples.
        by: field of the group.
        folder: where the result is kept.
        option: what of the source's config asks for groups, for the message.

    Raises:
        UserError: a sample without the field.
    """

    def place(fields: Mapping[str, Any]) -> int:
        value = lookup(fields, by)
        return 0 if value is None else 1 + _hash(str(value))

    hashes = _kept(source, f"group {by}", folder, place)
    if count := int((hashes == 0).sum()):
        raise UserError(
            f"{option} of source {source.name}: {count} of {len(source)} samples have no {by!r}; {there_are(source)}"
        )
    return np.maximum(hashes - 1, -1)


def check_apart(train: Sequence[np.ndarray], val: Sequence[np.ndarray], by: str) -> None:
    """Refuse groups that are in both parts. Only hashes are told: a patient's number is nobody's business.

    Args:
        train, val: `group_hashes` of each source.
        by: what the groups are, for the message.

    Raises:
        UserError: a group is in a source of each.
    """
    ours, theirs = (np.concatenate([*part, np.empty(0, np.int64)]) for part in (train, val))
    both = np.intersect1d(ours[ours >= 0], theirs[theirs >= 0])
    if len(both):
        counts = [int(np.isin(part, both).sum()) for part in (ours, theirs)]
        shown = ", ".join(f"{int(value):016x}" for value in both[:3])
        raise UserError(
            f"{len(both)} of {len(np.unique(theirs[theirs >= 0]))} groups by {by} in data.val_sources are in "
            f"data.sources too ({counts[1]} and {counts[0]} samples; hashes {shown}{'…' if len(both) > 3 else ''}): "
            f"split both by {by}, parts train and test, or set group: false at a source whose {by} counts anew"
        )


def apply_keep(source: Source, path: str) -> Source:
    """The samples whose key is in a list: parquet (column `key`), .npy or .txt (one a line).

    Raises:
        UserError: an unreadable list, or none of its keys is there.
    """
    wanted = read_keys(path)
    # Compared by 64-bit hash: for 24 M keys against 24 M a chance of 3e-5 that a single sample too many gets in.
    listed = np.unique(np.fromiter(map(hash, wanted), np.int64, len(wanted)))
    there = np.fromiter((hash(source.key(i)) for i in range(len(source))), np.int64, len(source))
    mask = np.isin(there, listed)
    if not mask.any():
        raise UserError(
            f"source {source.name} is empty: none of its {len(source)} samples is among the {len(wanted)} keys of "
            f"{path} (keys look like {source.key(0)!r} here and {wanted[0] if wanted else ''!r} there)"
        )
    if missing := len(listed) - len(np.unique(there[mask])):
        _log.warning("source %s: %d of the %d keys of %s are not in it", source.name, missing, len(listed), path)
    return source.select(mask)


def apply_few(source: Source, config: Mapping[str, Any], folder: Path, rule: LabelRule | None) -> Source:
    """A few samples, to learn from little: k of each class, or a share of the groups.

    Which they are is decided by a hash of seed and group, whatever the order of samples: what a smaller number keeps, a
    larger one keeps too. A sample counts for each of its classes, so that a class may get more than k. As many samples
    in which all classes are known to be absent are kept too, if there are any: of one class alone nothing is learned.

    Args:
        source: to take from.
        config: {per_class: k, or fraction: of the groups, by: field of groups that are kept whole (each sample for
            itself), seed, list: keep-list that is applied first}.
        folder: where what metadata says is kept.
        rule: how the source's labels are made; for `per_class`.

    Raises:
        UserError: an unknown option, no such field, no labels, or too few samples of a class.
    """
    if unknown := set(config) - {"per_class", "fraction", "by", "seed", "list"}:
        raise UserError(
            f"keep of source {source.name} has unknown keys {sorted(map(str, unknown))}: use per_class or fraction, "
            "by, seed and list"
        )
    count, fraction, by, seed = (config.get(key) for key in ("per_class", "fraction", "by", "seed"))
    seed = 0 if seed is None else seed
    if (count is None) == (fraction is None):
        raise UserError(f"keep of source {source.name} is {dict(config)}: give either per_class or fraction")
    if not _whole(seed) or (count is not None and not (_whole(count) and count > 0)):
        raise UserError(
            f"keep of source {source.name} is {dict(config)}: per_class (1 or more) and seed are whole numbers"
        )
    if fraction is not None and (isinstance(fraction, bool | str) or not 0 < fraction <= 1):
        raise UserError(f"keep of source {source.name} is {dict(config)}: fraction is a number above 0, at most 1")
    if config.get("list"):
        source = apply_keep(source, str(config["list"]))
    lots = _draw_lots(source, by, seed, folder)
    source, lots = source.select(lots >= 0), lots[lots >= 0]
    if fraction is not None:
        groups = np.unique(lots)
        return source.select(np.isin(lots, groups[: max(1, round(fraction * len(groups)))]))
    if rule is None:
        raise UserError(
            f"keep of source {source.name}: per_class needs labels: say how they are made by data.labels, or by "
            "the source's own labels"
        )
    rule.check(source)
    present = _present(source, rule, folder)
    if short := [f"{name} ({n})" for name, n in zip(rule.names, present[:, 1:].sum(0), strict=True) if n < count]:
        raise UserError(
            f"keep of source {source.name}: per_class={count}, but there are fewer samples of {', '.join(short)}: "
            "lower it, or leave them out of labels.names"
        )
    chosen = [np.sort(lots[with_it])[:count] for with_it in present.T]
    return source.select(np.isin(lots, np.concatenate(chosen)))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _draw_lots(source: Source, by: str | None, seed: int, folder: Path) -> np.ndarray:
    """int64 (n,): one number for each group; -1 where its metadata could not be read."""
    if by is None:
        hashes = np.fromiter((_hash(source.key(i)) for i in range(len(source))), np.int64, len(source))
    else:
        hashes = group_hashes(source, by, folder, option="keep")
    groups, which = np.unique(hashes, return_inverse=True)
    # Hashed anew: a split's parts are made of the first hashes.
    lots = np.array([-1 if group < 0 else _hash(f"keep {seed} {group}") for group in groups.tolist()], dtype=np.int64)
    return lots[which]


def _present(source: Source, rule: LabelRule, folder: Path) -> np.ndarray:
    """bool (n, 1 + c): whether all classes are known to be absent, and whether each is present.

    A sample with a bad label has none of these; it is counted when it is read.
    """
    if len(rule.names) > _MOST_CLASSES:
        raise UserError(
            f"keep of source {source.name}: per_class takes {_MOST_CLASSES} classes at most, labels.names has "
            f"{len(rule.names)}"
        )

    def bits(fields: Mapping[str, Any]) -> int:
        try:
            label = rule.vector(fields)
        except BadSample:
            return 0
        return int((label == 0).all()) + sum(2 << int(k) for k in np.flatnonzero(label == 1))

    # A set is written in another order by each process.
    question = f"labels {sorted(rule.unlabelled)} {replace(rule, unlabelled=frozenset())}"
    answers = np.maximum(_kept(source, question, folder, bits), 0)
    return (answers[:, None] >> np.arange(1 + len(rule.names)) & 1).astype(bool)


def read_keys(path: str) -> list[str]:
    """Keys of a keep-list.

    Raises:
        UserError: it cannot be read.
    """
    path = str(Path(path).expanduser())
    try:
        match Path(path).suffix:
            case ".parquet":
                import pandas as pd

                return [str(key) for key in pd.read_parquet(path, columns=["key"])["key"]]
            case ".npy":
                keys = np.load(path, allow_pickle=False).ravel().tolist()
                return [key.decode() if isinstance(key, bytes) else str(key) for key in keys]
            case ".txt":
                return [line for line in Path(path).read_text("utf-8-sig").split("\n") if line]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot read keep-list {path} ({str(error)[:120]}): give a parquet with a column `key`, or .npy"
        ) from error
    raise UserError(f"keep-list {path} has an unknown ending: use .parquet (column `key`), .npy or .txt")


def missing_fields(
    source: Source, names: Iterable[str], has: Callable[[Mapping[str, Any], str], bool] = has_field
) -> list[str]:
    """Those of `names`, each once, that none of the first readable samples `has`."""
    missing = list(dict.fromkeys(names))
    for i in range(min(len(source), _LOOK)):
        if not missing:
            break
        with suppress(BadSample):
            fields = source.fields(i)
            missing = [name for name in missing if not has(fields, name)]
    return missing


def there_are(source: Source) -> str:
    """The fields of the first readable sample, for messages."""
    for i in range(min(len(source), 20)):
        try:
            return "the fields are: " + ", ".join(_names(source.fields(i)))
        except BadSample:
            continue
    return "no metadata could be read"


def _first_has(source: Source, names: Sequence[str]) -> str:
    """What the first readable sample says in these fields, for messages."""
    for i in range(min(len(source), 20)):
        try:
            fields = source.fields(i)
        except BadSample:
            continue
        return "the first has " + ", ".join(f"{name} {str(lookup(fields, name))[:40]!r}" for name in names)
    return "no metadata could be read"


def _names(fields: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in fields.items():
        names += _names(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [prefix + name]
    return names


def _kept(source: Source, question: str, folder: Path, answer: Callable[[Mapping[str, Any]], int]) -> np.ndarray:
    """int64 (n,): `answer` (at least 0) for the fields of every sample, from disk if asked before.

    Negative where the metadata is broken or cannot be read; these samples are added to the source's problems.
    """
    path = folder / f"{fingerprint([source.fingerprint(), question])}.mask.npz"
    found = load_arrays(path)
    if found is not None and len(found["answers"]) == len(source):
        answers = found["answers"]
    else:

        def some(start: int) -> list[int]:
            return [_answer(source, i, answer) for i in range(start, min(start + _STEP, len(source)))]

        starts = range(0, len(source), _STEP)
        # Threads, since the time goes to storage; parsing takes about 0.1 ms for a whole article.
        with ThreadPoolExecutor(16) as pool:
            parts = list(track(pool.map(some, starts), len(starts), f"reading metadata of {source.name}"))
        answers = np.array([value for part in parts for value in part], dtype=np.int64)
        if not np.any(answers == _UNREAD):  # an outage must not be remembered
            save_arrays(path, answers=answers)
    for i in np.flatnonzero(answers < 0):
        reason = "broken metadata" if answers[i] != _UNREAD else "read error"
        source.problems.append((source.key(int(i)), reason, "needed for a filter or split"))
    return answers


def _answer(source: Source, i: int, answer: Callable[[Mapping[str, Any]], int]) -> int:
    try:
        return answer(source.fields(i))
    except BadSample as failure:
        return _UNREAD if failure.reason == "read error" else -1


def _hash(text: str) -> int:
    """62 bits of a hash that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
