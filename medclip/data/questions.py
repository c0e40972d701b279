"""Questions about images: what a source says of each, in one form, whatever its columns are called.

    {table: train.json, image_root: imgs, filter: 'q_lang == "en"',
     questions: {question: question, answer: answer, type: answer_type, kind: content_type, organ: location,
                 modality: modality, id: qid}}

Each row of the source is one question with its right answer; an image has as many rows as questions. Keys of
`questions`, of which `question` and `answer` are needed; the others may be null:

| key | names the field of |
|---|---|
| `question`, `answer` | the two texts |
| `type` | CLOSED or OPEN (yes/no counts as closed); where a row has none, the answers yes and no are closed |
| `kind`, `organ`, `modality` | what is asked about, and of what; or `{value: plane}`, the same for all rows |
| `id` | a number or name that no two rows share; without it the sample's key, counted on where it repeats |
| `image` | the image's name, where it is not the image column's (tables) |

The metadata of a sample then has a field `vqa` with `id`, `image`, `question` and `answer` (see `answers` for their
words), `type` ("closed" or "open"), `slot` ("closed: yes", "open: left lung": an answer to both is two), `kind`,
`organ` and `modality` ("" where nobody says). Filters, splits, labels and captions name them with a dot:

    split: {by: vqa.image, part: train}         # all questions about an image are in one part
    caption: vqa.question                       # what these sources have where `caption` says nothing
    labels: {names: …, from: class, field: vqa.slot, other: zeros}

`vocabulary` lists the answers of the training questions for `labels.names`, `words` the words of the questions,
`texts` the questions.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from medclip.data.answers import normal_answer, normal_question
from medclip.data.arrow import ArrowSource
from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.filters import lookup
from medclip.data.index import digest, fingerprint
from medclip.data.inside import is_inside
from medclip.data.packed import Packed
from medclip.data.raw import RawSample, Source
from medclip.data.selection import missing_fields, there_are
from medclip.data.tables import TableSource
from medclip.types import UserError

_log = logging.getLogger(__name__)
_KEYS = ("question", "answer", "type", "kind", "organ", "modality", "id", "image")
_OF_WHAT = ("kind", "organ", "modality")
_TYPES = {"closed": "closed", "close": "closed", "yes/no": "closed", "yes-no": "closed", "binary": "closed"} | {
    name: "open" for name in ("open", "open-ended", "other", "number")
}


@dataclass(frozen=True)
class QuestionRule:
    """Which fields say what; see the module's first lines."""

    question: str
    answer: str
    type: str | None = None
    id: str | None = None
    image: str | None = None
    of_what: Mapping[str, str | Mapping[str, str]] | None = None

    @classmethod
    def parse(cls, name: str, config: Any) -> QuestionRule:
        """From a source's `questions`.

        Args:
            name: of the source, for messages.
            config: its `questions`.

        Raises:
            UserError: an unknown or missing key, or no name of a field.
        """
        if not isinstance(config, Mapping) or not config.get("question") or not config.get("answer"):
            raise UserError(f"source {name}: questions is {config!r}: write {{question: FIELD, answer: FIELD, …}}")
        if unknown := set(config) - set(_KEYS):
            raise UserError(f"source {name}: questions has unknown keys {sorted(map(str, unknown))}: use {_KEYS}")
        for key, value in config.items():
            constant = key in _OF_WHAT and isinstance(value, Mapping) and set(value) == {"value"}
            if not (constant or value is None or isinstance(value, str)):
                raise UserError(f"source {name}: questions.{key} is {value!r}: give the name of a field, or null")
        named: dict[str, Any] = {key: config.get(key) for key in ("question", "answer", "type", "id", "image")}
        return cls(**named, of_what={key: config[key] for key in _OF_WHAT if config.get(key)})

    @property
    def fields(self) -> list[str]:
        """All fields that samples must have."""
        given = [self.question, self.answer, self.type, self.id, self.image, *(self.of_what or {}).values()]
        return [field for field in given if isinstance(field, str)]

    def about(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """What the metadata of one sample says; `id` and `image` only where the rule names their fields.

        Raises:
            BadSample: no question or no answer.
            ValueError: a type that is neither closed nor open.
        """
        question = normal_question(_text(fields, self.question, "question"))
        answer = normal_answer(_text(fields, self.answer, "answer"))
        kind = _said(lookup(fields, self.type)).lower() if self.type else ""
        if kind not in _TYPES and kind:
            raise ValueError(kind)
        kind = _TYPES.get(kind) or ("closed" if answer in ("yes", "no") else "open")
        about = {"question": question, "answer": answer, "type": kind, "slot": f"{kind}: {answer}"}
        for key in _OF_WHAT:
            field = (self.of_what or {}).get(key)
            about[key] = field["value"] if isinstance(field, Mapping) else _said(lookup(fields, field)) if field else ""
        for key, field in (("id", self.id), ("image", self.image)):
            if field is not None:
                about[key] = _text(fields, field, key)
        return about


@dataclass(frozen=True)
class QuestionSource:
    """A source whose samples are questions.

    Args:
        source: whose samples they are.
        asked: what each row says, as JSON; read once, when the source is opened.
        rows: int64, numbers of the rows of `asked` that are in.
    """

    source: Source
    asked: Packed
    rows: np.ndarray

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def weight(self) -> float:
        return self.source.weight

    @property
    def caption(self) -> CaptionRule:
        return self.source.caption

    @property
    def problems(self) -> list[tuple[str, str, str]]:
        return self.source.problems

    @property
    def chunks(self) -> np.ndarray:
        return self.source.chunks

    def __len__(self) -> int:
        return len(self.rows)

    def about(self, i: int) -> dict[str, str]:
        """The field `vqa` of sample i."""
        return orjson.loads(self.asked.bytes(int(self.rows[i])))

    def abouts(self) -> Iterator[dict[str, str]]:
        """That of all samples in turn."""
        return (self.about(i) for i in range(len(self)))

    def key(self, i: int) -> str:
        return self.about(i)["id"]

    def read(self, i: int, *, want_meta: bool = False) -> RawSample:
        raw, about = self.source.read(i, want_meta=want_meta), self.about(i)
        meta = {**(raw.meta or {}), "vqa": about} if want_meta else raw.meta
        return RawSample(about["id"], raw.image, raw.text, meta)

    def fields(self, i: int) -> dict[str, Any]:
        about = self.about(i)
        return self.source.fields(i) | {"key": about["id"], "vqa": about}

    def extents(self, i: int) -> tuple[str, int, int] | None:
        return self.source.extents(i)

    def select(self, rows: np.ndarray) -> QuestionSource:
        return replace(self, source=self.source.select(rows), rows=self.rows[rows])

    def fingerprint(self) -> str:
        return fingerprint([self.source.fingerprint(), digest(self.asked.blob), digest(self.rows)])


def ask(source: Source, config: Any) -> QuestionSource:
    """The samples of a source as questions; those without a question, an answer or an image are left out and counted.

    Args:
        source: opened, before anything is selected from it.
        config: its `questions`, see above.

    Raises:
        UserError: a rule that does not fit, a type that is neither closed nor open, or no question that can be used.
    """
    rule = QuestionRule.parse(source.name, config)
    _check_fields(source, rule)
    asked: list[dict[str, str]] = []
    rows: list[int] = []
    there: dict[str, bool] = {}
    counts: Counter[str] = Counter()
    for i in range(len(source)):
        key = source.key(i)
        try:
            fields = source.fields(i)
            about = rule.about(fields)
            about.setdefault("image", _image(source, i, fields))
            if isinstance(source, TableSource):
                file = str(fields[source.image]) + source.suffix
                if not there.setdefault(file, is_inside(source.root, file)):
                    raise BadSample("missing image", f"{file} is not in {source.root}")
        except BadSample as failure:
            source.problems.append((key, failure.reason, failure.detail))
            continue
        except ValueError as error:
            raise UserError(
                f"source {source.name}: {rule.type} of {key} is {str(error)!r}, neither closed nor open: name another "
                "field in questions.type, or null, by which the answers yes and no are closed"
            ) from None
        counts[key] += 1
        about.setdefault("id", key if counts[key] == 1 else f"{key}#{counts[key]}")
        asked.append(about)
        rows.append(i)
    if not asked:
        key, reason, detail = source.problems[-1]
        raise UserError(
            f"source {source.name} has no question that can be used: all {len(source.problems)} were left out, the "
            f"last ({key}) for {reason}: {detail}"
        )
    packed = Packed.of([orjson.dumps(about) for about in asked])
    return QuestionSource(source.select(np.array(rows, dtype=np.int64)), packed, np.arange(len(asked)))


def check_ids(source: QuestionSource) -> None:
    """Refuse a source of which two questions have the same id.

    Raises:
        UserError: so it is.
    """
    counts = Counter(about["id"] for about in source.abouts())
    if twice := [key for key, count in counts.items() if count > 1]:
        raise UserError(
            f"source {source.name}: {len(twice)} ids are those of several questions ({_some(twice)}): name a field "
            "that tells them apart in questions.id, or null, which counts them"
        )


def vocabulary(
    sources: Sequence[Mapping[str, Any]],
    *,
    field: str = "vqa.slot",
    least: int = 1,
    also: Sequence[Mapping[str, Any]] = (),
    storage: Mapping[str, Any] | None = None,
) -> list[str]:
    """The answers that a model can give: closed ones first, each part from the most frequent to the rarest.

    Args:
        sources: configs of the training questions.
        field: `vqa.slot`, by which an answer to closed and to open questions is two; `vqa.answer`: one list for both;
            `vqa.type`: closed and open themselves.
        least: questions that an answer must be the right one to.
        also: further sources whose answers count too. As published these are the test set's: it tells which answers
            will be asked for, so that scores rise.
        storage: as in `data.storage`.

    Raises:
        UserError: a source that has no questions, another field, or no answer that is frequent enough.
    """
    key = {"vqa.slot": "slot", "vqa.answer": "answer", "vqa.type": "type"}.get(field)
    if key is None or isinstance(least, bool) or not isinstance(least, int) or least < 1:
        raise UserError(
            f"vocabulary: field is {field!r} and least {least!r}: use vqa.slot, vqa.answer or vqa.type, and a number"
        )
    counts: Counter[str] = Counter()
    closed: Counter[str] = Counter()
    for about in _abouts([*sources, *also], storage):
        counts[about[key]] += 1
        closed[about[key]] += about["type"] == "closed"
    names = [name for name, count in counts.items() if count >= least]
    if not names:
        raise UserError(f"vocabulary: no answer is right for {least} questions or more: lower least")
    # In one list for both an answer counts where it is most at home.
    return sorted(names, key=lambda name: (2 * closed[name] < counts[name], -counts[name], name))


def words(
    sources: Sequence[Mapping[str, Any]],
    *,
    least: int = 1,
    also: Sequence[Mapping[str, Any]] = (),
    storage: Mapping[str, Any] | None = None,
) -> list[str]:
    """The words of the questions, from the most frequent to the rarest.

    Args:
        sources: configs of the training questions.
        least: times that a word must occur.
        also: further sources whose words count too; as published these are the test set's.
        storage: as in `data.storage`.

    Raises:
        UserError: a source that has no questions.
    """
    counts: Counter[str] = Counter()
    for about in _abouts([*sources, *also], storage):
        counts.update(about["question"].split())
    return sorted((word for word, count in counts.items() if count >= least), key=lambda word: (-counts[word], word))


def texts(sources: Sequence[Mapping[str, Any]], *, storage: Mapping[str, Any] | None = None) -> list[str]:
    """The questions themselves, in the words by which they are compared.

    Args:
        sources: configs of the training questions.
        storage: as in `data.storage`.

    Raises:
        UserError: a source that has no questions.
    """
    return [about["question"] for about in _abouts(sources, storage)]


def unknown_answers(source: QuestionSource, names: Sequence[str]) -> Counter[str]:
    """The right answers that are not among `names`, slots or bare answers, with the number of their questions."""
    known = set(names)
    return Counter(about["slot"] for about in source.abouts() if known.isdisjoint((about["slot"], about["answer"])))


def shared_images(train: Sequence[Source], test: Sequence[Source]) -> tuple[int, int]:
    """How many images of the test questions are in training too, and how many of the test questions ask about these."""
    ours, theirs = (
        Counter(about["image"] for source in part if isinstance(source, QuestionSource) for about in source.abouts())
        for part in (train, test)
    )
    both = ours.keys() & theirs.keys()
    return len(both), sum(theirs[image] for image in both)


def report(
    train: Sequence[Source], val: Sequence[Source], names: Sequence[str], part: str = "data.val_sources"
) -> None:
    """Log what makes the questions of `val` too easy or too hard: images seen in training, answers never heard.

    Args:
        train: opened training sources.
        val: opened sources that are scored.
        names: the vocabulary; () where there is none.
        part: what `val` is called.
    """
    asked = [source for source in val if isinstance(source, QuestionSource)]
    count = sum(map(len, asked))
    images, questions = shared_images(train, asked)
    if images:
        _log.warning(
            "%s: %d of %d questions are about %d images that training has too, and flatter the score: split by "
            "vqa.image, or refuse them with data.group=vqa.image",
            *(part, questions, count, images),
        )
    unknown = Counter[str]() if not names else sum((unknown_answers(one, names) for one in asked), Counter[str]())
    if unknown:
        _log.warning(
            "%s: the answers of %d of %d questions are not in the vocabulary and count as wrong (%s)",
            *(part, unknown.total(), count, _some([name for name, _ in unknown.most_common()])),
        )


def _abouts(configs: Sequence[Mapping[str, Any]], storage: Mapping[str, Any] | None) -> Iterator[dict[str, str]]:
    """What the samples of these sources say, once all of them are open."""
    from medclip.data.sources import open_sources  # here: it opens sources of this kind, too

    options = dict(storage or {})
    found: list[QuestionSource] = []
    for source in open_sources([{**config, "labels": None} for config in configs], **options):
        if not isinstance(source, QuestionSource):
            raise UserError(
                f"source {source.name} has no questions: say {{question: FIELD, answer: FIELD}} in its `questions`"
            )
        found.append(source)
    for source in found:
        yield from source.abouts()


def _check_fields(source: Source, rule: QuestionRule) -> None:
    if missing := missing_fields(source, rule.fields):
        raise UserError(
            f"source {source.name}: questions names {', '.join(map(repr, missing))}, which no sample has; "
            f"{there_are(source)}"
        )


def _image(source: Source, i: int, fields: Mapping[str, Any]) -> str:
    """The name of a sample's image: of its file, else of its bytes, else the sample's own."""
    if isinstance(source, TableSource):
        return str(fields[source.image]) + source.suffix
    if isinstance(source, ArrowSource):
        return hashlib.blake2b(source.read(i).image, digest_size=16).hexdigest()
    return source.key(i)


def _text(fields: Mapping[str, Any], field: str, role: str) -> str:
    value = lookup(fields, field)
    if isinstance(value, Mapping | list):
        raise BadSample(f"bad {role}", f"{field} is a {type(value).__name__}, not one text")
    text = _said(value)
    if not text or (role == "answer" and not normal_answer(text)) or (role == "question" and not normal_question(text)):
        raise BadSample(f"missing {role}", f"nothing in {field}")
    return text


def _said(value: Any) -> str:
    """A value of metadata as text: "" for none, no decimal point for a whole number."""
    if value is None or value != value:  # NaN
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
