"""Texts to token ids: exactly open_clip's, several times faster for CLIP's byte-pair encoding.

open_clip's `SimpleTokenizer` spends its time in ftfy, `html.unescape` and one regular expression a text. Two facts save
most of it without changing one id:

1. Printable ASCII without `&` comes out of ftfy and `html.unescape` as it went in (every rule of theirs needs a
   character beyond ASCII, a control character or an entity). Anything else still goes through open_clip's own cleaning.
2. No token spans white space, so a text's ids are those of its white-space separated words, which repeat: they are kept
   in a bounded dictionary. Every word yields at least one token, so the rest of a long text is never looked at.

Hugging Face tokenizers (SigLIP, BERT) are open_clip's `HFTokenizer` as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from torch import Tensor

from medclip.types import Tokenizer, UserError

_PLAIN = re.compile(r"[\t\n\r -%'-~]*").fullmatch  # printable ASCII without "&", and the white space that captions hold
_MAX_WORDS = 200_000  # about 40 MB; a corpus has millions of rare words, which must not fill a worker's memory


class BpeTokenizer:
    """CLIP's byte-pair encoding with open_clip's ids; cheap to pickle, safe to fork.

    Args:
        context_length: length of every row; longer texts are cut and keep the end token.
        clean: open_clip's cleaning: `lower`, `whitespace` or `canonicalize`.
    """

    def __init__(self, context_length: int = DEFAULT_CONTEXT_LENGTH, clean: str = "lower") -> None:
        self.context_length = context_length
        self.clean = clean
        self._reference = _reference(clean)
        self._words: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return BpeTokenizer, (self.context_length, self.clean)  # the vocabulary is on every machine already

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 (n, context_length), zero-padded."""
        texts = [texts] if isinstance(texts, str) else texts
        limit = self.context_length - 1
        start, end = self._reference.sot_token_id, self._reference.eot_token_id
        rows = np.zeros((len(texts), self.context_length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [start]
            for word in self._split(text):
                ids += self._words.get(word) or self._encode_word(word)
                if len(ids) >= limit:
                    break
            ids = [*ids[:limit], end]
            row[: len(ids)] = ids
        return torch.from_numpy(rows)

    def count(self, text: str) -> int:
        """Tokens that `text` takes uncut, start and end included: it fits when this is at most `context_length`."""
        return 2 + len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """All ids of `text`, uncut, without start and end."""
        return list(chain.from_iterable(self._words.get(w) or self._encode_word(w) for w in self._split(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """The text that a row of ids stands for, as far as it was not cut: what the model reads."""
        special = {0, self._reference.sot_token_id, self._reference.eot_token_id}
        return self._reference.decode([i for i in ids if i not in special]).strip()

    def _split(self, text: str) -> list[str]:
        if self.clean != "canonicalize" and _PLAIN(text):
            return (text.lower() if self.clean == "lower" else text).split()
        return self._reference.clean_fn(text).split(" ")

    def _encode_word(self, word: str) -> list[int]:
        reference, ids = self._reference, []
        for piece in reference.pat.findall(word):
            symbols = "".join(reference.byte_encoder[b] for b in piece.encode("utf-8"))
            ids += [reference.encoder[token] for token in reference.bpe(symbols).split(" ")]
        if len(self._words) >= _MAX_WORDS:
            self._words.clear()
            reference.cache = {t: t for t in ("<start_of_text>", "<end_of_text>")}  # open_clip's own grows for ever
        self._words[word] = ids
        return ids


@lru_cache
def _reference(clean: str) -> SimpleTokenizer:
    return SimpleTokenizer(clean=clean)


class HubTokenizer:
    """open_clip's `HFTokenizer`, from a folder or a hub name, with the `count` that fitting sentences needs."""

    def __init__(self, name: str | Path, context_length: int, mode: str | None = None, **options: Any) -> None:
        self.context_length = context_length
        self.inner = HFTokenizer(str(name), context_length=context_length, tokenizer_mode=mode, **options)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 (n, context_length)."""
        return self.inner([texts] if isinstance(texts, str) else list(texts))

    def count(self, text: str) -> int:
        """Tokens that `text` takes uncut, special ones included."""
        return len(self.inner.tokenizer(self.inner.clean_fn(text), verbose=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text that a row of ids stands for, as far as it was not cut: what the model reads."""
        return self.inner.tokenizer.decode(ids, skip_special_tokens=True)


def build_tokenizer(text_cfg: Mapping[str, Any], folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer that open_clip would use for `text_cfg`.

    Args:
        text_cfg: open_clip's; `hf_tokenizer_name` says that it is a Hugging Face one.
        folder: where the files of a Hugging Face tokenizer lie.

    Raises:
        UserError: the tokenizer's files are missing or unreadable, or its options are not open_clip's.
    """
    context_length = text_cfg.get("context_length") or DEFAULT_CONTEXT_LENGTH
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    if not text_cfg.get("hf_tokenizer_name"):
        if unknown := set(options) - {"clean"}:
            raise UserError(f"tokenizer_kwargs {sorted(unknown)} of text_cfg are not supported: only `clean` is")
        return BpeTokenizer(context_length, **options)
    if folder is None:
        raise UserError(
            f"tokenizer {text_cfg['hf_tokenizer_name']} has no files: load an open_clip folder that has them"
        )
    options |= {"trust_remote_code": False, "local_files_only": True}  # a config may ask for neither code nor network
    try:
        return HubTokenizer(folder, context_length, text_cfg.get("tokenizer_mode"), **options)
    except ImportError as error:
        raise UserError(
            f"this model's tokenizer needs transformers: pip install 'medclip-adapt[hf]' ({error})"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        name = text_cfg["hf_tokenizer_name"]
        raise UserError(
            f"cannot read tokenizer {name} from {folder} ({first_line(error)}): put its tokenizer.json and "
            "tokenizer_config.json there"
        ) from error


def first_line(error: BaseException) -> str:
    """Of another library's error: enough to recognise it by."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
