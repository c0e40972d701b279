"""CLIP's byte-pair encoding in the format of Hugging Face's `tokenizers`, which other languages read as well.

open_clip keeps it in Python. Of its cleaning, straight quotes and composed characters are in the file; repaired
mojibake, HTML entities and ligatures have no counterpart in the format: texts that have none of them get the same ids.
"""

from __future__ import annotations

from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from medclip.types import UserError

_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def bpe_tokenizer(clean: str = "lower") -> dict[str, Any]:
    """The content of a `tokenizer.json`; rows are neither cut nor padded, which is the reader's to do.

    Args:
        clean: open_clip's cleaning: `lower` or `whitespace`.

    Raises:
        UserError: a cleaning that the format cannot say.
    """
    if clean not in ("lower", "whitespace"):
        raise UserError(f"onnx=true: tokenizer_kwargs.clean={clean} has no counterpart in tokenizer.json")
    reference = SimpleTokenizer(clean=clean)
    start, end = "<start_of_text>", "<end_of_text>"
    ids = {token: reference.encoder[token] for token in (start, end)}
    quotes = [
        {"type": "Replace", "pattern": {"Regex": r"[\u02bc\u2018-\u201b]"}, "content": "'"},
        {"type": "Replace", "pattern": {"Regex": r"[\u201c-\u201f]"}, "content": '"'},
    ]
    white = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ranks = sorted(reference.bpe_ranks.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **special} for token, number in ids.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, *quotes, white, {"type": "Strip", "strip_left": True, "strip_right": True}]
            + [{"type": "Lowercase"}] * (clean == "lower"),
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": start, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": end, "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                token: {"id": token, "ids": [number], "tokens": [token]} for token, number in ids.items()
            },
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(reference.encoder),
            "merges": [f"{left} {right}" for (left, right), _ in ranks],
        },
    }
