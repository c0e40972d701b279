"""Answers and questions in the words by which they are compared: two of equal meaning should be equal texts.

Answers follow the rules of the VQA evaluation (Antol et al. 2015, arXiv:1505.00468, visualqa.org/evaluation.html) as
MEVF applies them to radiology (Nguyen et al. 2019, arXiv:1909.11867): marks of punctuation become spaces, or nothing
beside a space; lower case; number words to ten as digits; no articles; apostrophes where a contraction lacks them; "x
ray" as "xray". Three things differ from the published code. An answer of articles alone ("A") is kept, "x ray" is one
word only where it begins one, and "im" and "ive" stay (intramuscular).

Questions follow MEVF's dictionary: lower case, no commas, question marks and full stops (that of "3.4 cm" stays; the
published code makes it 34), "'s" as a word, "x ray" as "x-ray", and no note of the answer's type at the end.
"""

from __future__ import annotations

import re
from itertools import product

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(n)
    for n, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1)
}
_ARTICLES = {"a", "an", "the"}
# Not those whose letters alone are another word: we're, she'll, it's, let's, I'm…
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_DECIMAL_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")  # a decimal point has a digit behind it
_X_RAY = re.compile(r"\bx ray")
_NOTE = re.compile(r"\?\s*-\s*(yes/no|open)\b")


def _without(word: str) -> list[str]:
    """`word` with each choice of its apostrophes left out, but for none."""
    pieces = word.split("'")
    kept = list(product(("", "'"), repeat=len(pieces) - 1))[:-1]
    return ["".join(map("".join, zip(pieces, (*marks, ""), strict=True))) for marks in kept]


_WHOLE = {lacking: word for word in _CONTRACTIONS.split() for lacking in _without(word)}


def normal_answer(answer: object) -> str:
    """The words by which an answer is compared, see above; "" only for an answer without a word."""
    text = str(answer)
    glued = _DECIMAL_COMMA.search(text) is not None
    for mark in _MARKS:
        beside = glued or f"{mark} " in str(answer) or f" {mark}" in str(answer)
        text = text.replace(mark, "" if beside else " ")
    words = _FULL_STOP.sub("", text).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    words = [_WHOLE.get(word, word) for word in words if word not in _ARTICLES] or words
    return _X_RAY.sub("xray", " ".join(words))


def normal_question(question: object) -> str:
    """The words of a question with a space between any two; "" for a question without a word."""
    text = _NOTE.sub("?", str(question).lower())
    text = _FULL_STOP.sub("", text.replace(",", "").replace("?", "").replace("'s", " 's"))
    return _X_RAY.sub("x-ray", " ".join(text.split()))
