"""Every caption of an image states the same facts, those that were drawn, and nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest

from medclip.phantoms.captions import CAPTIONS, VOCABULARY, facts_stated, xray_captions
from medclip.phantoms.generate import CLASSES, generate
from medclip.phantoms.phantom import KINDS, Phantom


@pytest.fixture(scope="module", params=KINDS)
def phantoms(request: pytest.FixtureRequest) -> list[Phantom]:
    return generate(request.param, 17, range(300), 64, per_patient=1)


def facts_drawn(phantom: Phantom) -> dict[str, set[str]]:
    """What a caption must state: every fact that has words; "none" and "regular" have none."""
    facts = {"label": phantom.label, **phantom.attributes}
    return {name: {facts[name]} & values.keys() for name, values in VOCABULARY[phantom.kind].items()}


def test_a_caption_reads_back_as_what_was_drawn(phantoms: list[Phantom]) -> None:
    for p in phantoms:
        for caption in p.captions:
            assert facts_stated(p.kind, caption) == facts_drawn(p), caption


def test_an_image_has_several_captions_that_differ(phantoms: list[Phantom]) -> None:
    for p in phantoms:
        assert len(set(p.captions)) == len(p.captions) == CAPTIONS
        for caption in p.captions:
            assert caption[0].isupper() and caption.endswith(".") and caption.count(".") == 1
            assert not re.search(r"[{}]|\s\s|\s[.,;]|none|regular", caption), caption
    assert len({c for p in phantoms for c in p.captions}) > 2 * len(phantoms)  # synonyms and shells are used


def test_every_phrase_is_used_and_every_class_has_synonyms(phantoms: list[Phantom]) -> None:
    kind = phantoms[0].kind
    text = "\n".join(c for p in phantoms for c in p.captions).lower()
    for values in VOCABULARY[kind].values():
        for phrases in values.values():
            assert all(phrase.lower() in text for phrase in phrases)
    assert all(len(VOCABULARY[kind]["label"][label]) > 1 for label in CLASSES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_no_phrase_hides_in_a_phrase_of_another_value(kind: str) -> None:
    assert VOCABULARY[kind]["label"].keys() == set(CLASSES[kind])
    for values in VOCABULARY[kind].values():
        for value, phrases in values.items():
            for other, others in values.items():
                for a in phrases:
                    for b in others:
                        assert value == other or not re.search(rf"(?<!\w){re.escape(a)}(?!\w)", b, re.IGNORECASE)


def test_a_finding_names_its_side_and_a_normal_film_none() -> None:
    rng = np.random.default_rng(0)
    effusion = {"severity": "large", "side": "left", "zone": "none", "view": "AP"}
    for caption in xray_captions(rng, "pleural effusion", effusion):
        words = set(re.findall(r"[a-z]+", caption.lower()))
        assert "left" in words and "right" not in words and words & {"large", "sizeable"}
        assert not words & {"upper", "middle", "mid", "lower", "posteroanterior", "pa"}
    normal = {"severity": "none", "side": "none", "zone": "none", "view": "PA"}
    for caption in xray_captions(rng, "no finding", normal):
        words = set(re.findall(r"[a-z]+", caption.lower()))
        assert not words & {"left", "right", "effusion", "nodule", "small", "large"}


def test_reading_back_notices_a_wrong_side_and_a_second_label() -> None:
    stated = facts_stated("xray", "PA chest radiograph showing small right pleural effusion and a lung nodule.")
    assert stated["side"] == {"right"} and stated["label"] == {"pleural effusion", "lung nodule"}
    assert stated["view"] == {"PA"} and stated["severity"] == {"small"} and stated["zone"] == set()
