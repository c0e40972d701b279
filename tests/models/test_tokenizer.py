"""Token ids against open_clip's own, string by string."""

from __future__ import annotations

import multiprocessing
import pickle
import random
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from medclip.models import tokenizer as module
from medclip.models.tokenizer import BpeTokenizer, HubTokenizer, build_tokenizer
from medclip.types import Tokenizer, UserError

REFERENCE = SimpleTokenizer()
OURS = BpeTokenizer()

HARD = [
    "",
    " ",
    "\t\n \r\n",
    "A chest X-ray, PA view, showing a left-sided pleural effusion (arrow).",
    "it's they've we'll I'm you're he'd DON'T 's 't 'SAID rock'n'roll '",
    "H&amp;E stain &lt;40x&gt; &amp;amp; &nbsp; &eacute; &#233; &#x3b1; &notanentity; R&D & co",
    "schöne Grüße, naïve café, Ångström, œuvre, ﬁbrosis, ﬂuid",
    "μm µm 10⁻³ ×40 ± 2°C ≤ 5 → ← … – — ‘single’ “double” ′ ″",
    "染色された細胞 и клетки τα κύτταρα الخلايا 세포",
    "👩🏽‍⚕️ 🫁🧬 👍🏿 flags 🇨🇭",
    "schÃ¶n â€œmojibakeâ€\x9d donâ€™t",
    "\x00 null \x07 bell \x1b[31mred\x1b[0m \x1c\x1d\x1e\x1f \x7f \x85 \x0b\x0c",
    "zero\u200bwidth soft\u00adhyphen nbsp\u00a0here ideographic\u3000space line\u2028separator \ufeffbom",
    "ＦＵＬＬ ｗｉｄｔｈ １２３",
    "<start_of_text> and <END_OF_TEXT> <start_of_text>glued",
    "10.1016/j.cell.2020.01.001 http://example.org/a?b=c_d%20e 1234567890 3.14e-10",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!??????---___",
    "İstanbul ǅ ß ẞ ſ K",  # letters whose lower case is special
    "e\u0301 combining n\u0303 vs ñ",
    "lone surrogate \ud800 here",
    "word " * 1000,
    "Pneumonoultramicroscopicsilicovolcanoconiosis" * 8,
    "\\u0041 \\x41 `code` ~tilde~ {braces} [brackets] |pipe| ^caret #hash @at $5 100%",
]


def _random_strings(count: int) -> list[str]:
    random.seed(7)
    words = [
        "cell",
        "Nucleus",
        "MRI",
        "CT's",
        "T1-weighted",
        "3.5mm",
        "(B)",
        "<b>",
        "&amp;",
        "α",
        "µm",
        "é",
        "🫀",
        "it's\n\t",
        "H&E",
        "\x1b[0m",
        "IgG4",
        "anti-CD20",
        "don’t",
    ]
    ranges = [(32, 126), (32, 126), (0, 255), (0x370, 0x3FF), (0x2000, 0x206F), (0x4E00, 0x4E80), (0x1F300, 0x1F600)]
    out = []
    for i in range(count):
        if i % 2:
            out.append(" ".join(random.choices(words, k=random.randint(0, 50))))
        else:
            low, high = random.choice(ranges)
            out.append("".join(chr(random.randint(low, high)) for _ in range(random.randint(0, 50))))
    return out


@pytest.mark.parametrize("context_length, count", [(8, 100), (48, 100), (77, 2200), (256, 100)])
def test_ids_equal_open_clip(context_length: int, count: int):
    texts = HARD + _random_strings(count)
    ours = BpeTokenizer(context_length)(texts)
    theirs = REFERENCE(texts, context_length=context_length)
    wrong = [text for text, a, b in zip(texts, ours, theirs, strict=True) if not torch.equal(a, b)]
    assert not wrong
    assert ours.dtype == torch.int64 and ours.shape == (len(texts), context_length)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120) | st.text(alphabet=st.characters(max_codepoint=127), max_size=200))
def test_ids_equal_open_clip_property(text: str):
    assert torch.equal(OURS(text), REFERENCE(text))
    assert OURS.encode(text) == REFERENCE.encode(text)


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_other_cleaning(clean: str):
    texts = HARD + _random_strings(200)
    assert torch.equal(BpeTokenizer(77, clean)(texts), SimpleTokenizer(clean=clean)(texts))


@pytest.mark.parametrize("text", HARD)
def test_count_says_whether_a_text_fits(text: str):
    assert OURS.count(text) == len(REFERENCE.encode(text)) + 2


def test_cache_is_bounded_and_refilled_rightly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MAX_WORDS", 10)
    small = BpeTokenizer()
    texts = [f"word{i} lesion{i % 3} <start_of_text>" for i in range(50)]
    assert torch.equal(small(texts), REFERENCE(texts))
    assert len(small._words) <= 10


def _tokenize(texts: list[str]) -> list[list[int]]:
    return OURS(texts).tolist()


def test_pickles_small_and_survives_fork():
    OURS("some words to fill the cache with")
    blob = pickle.dumps(OURS)
    assert len(blob) < 1000
    assert torch.equal(pickle.loads(blob)(HARD), REFERENCE(HARD))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for part in pool.map(_tokenize, [HARD[3:9], HARD[3:9]]):
            assert part == REFERENCE(HARD[3:9]).tolist()
        pool.close()  # not ended by a signal, which a child whose parent has a handler for it may outlive
        pool.join()


def test_hub_tokenizer_is_open_clips(bert_folder: Path, no_network: None):
    text_cfg = {"hf_tokenizer_name": "some/name", "context_length": 24, "tokenizer_kwargs": {"strip_sep_token": True}}
    ours = build_tokenizer(text_cfg, bert_folder)
    theirs = open_clip.tokenizer.HFTokenizer(str(bert_folder), context_length=24, strip_sep_token=True)
    texts = ["left lung nodule", "no effusions &amp; normal  CT", "", "the liver " * 30]
    assert torch.equal(ours(texts), theirs(texts))
    assert isinstance(ours, HubTokenizer) and isinstance(ours, Tokenizer)
    assert ours.count("left lung nodule") == 5
    assert ours.count("the liver " * 30) == 62
    assert torch.equal(pickle.loads(pickle.dumps(ours))(texts), theirs(texts))


def test_build_chooses_by_text_cfg():
    assert build_tokenizer({"context_length": 33}).context_length == 33
    assert build_tokenizer({}).context_length == 77
    with pytest.raises(UserError, match="reduction_mask"):
        build_tokenizer({"tokenizer_kwargs": {"reduction_mask": "simple"}})
    with pytest.raises(UserError, match="has no files"):
        build_tokenizer({"hf_tokenizer_name": "some/name"})


def test_folder_without_tokenizer_files_says_so(tmp_path: Path, no_network: None):
    with pytest.raises(UserError, match=r"cannot read tokenizer some/name .*tokenizer\.json"):
        build_tokenizer({"hf_tokenizer_name": "some/name"}, tmp_path)
