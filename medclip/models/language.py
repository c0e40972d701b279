"""A causal language model from a local Hugging Face folder, and what its tokenizer makes of questions and answers.

Weights are read from safetensors only, nothing is fetched, and code that a folder brings along is never run. The small
text files that say what it is go into checkpoints, so that these need the folder no more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from medclip.models.hf import read_files, write_files
from medclip.models.tokenizer import first_line
from medclip.types import UserError

IGNORED = -100  # in targets: no token


class LanguageTokens:
    """Questions, put into a prompt, to token ids of one length, padded at the front: the answer comes right after.

    Args:
        inner: a tokenizer of transformers.
        prompt: text with one {} for the question.
        context_length: tokens of a prompt; longer questions are cut.

    Raises:
        UserError: a tokenizer without an end token, a prompt without {}, or one that leaves a question no room.
    """

    def __init__(self, inner: Any, prompt: str, context_length: int) -> None:
        if inner.eos_token_id is None:
            raise UserError("model.language.folder: its tokenizer has no end token (eos_token, tokenizer_config.json)")
        if prompt.count("{}") != 1:
            raise UserError(f"model.prompt is {prompt!r}: write one {{}} where the question goes")
        self.inner = inner
        self.context_length = context_length
        self.end: int = inner.eos_token_id
        self.start: int | None = inner.bos_token_id
        self.padding: int = self.end if inner.pad_token_id is None else inner.pad_token_id
        self._before, self._after = (self._ids(part.strip()) for part in prompt.split("{}"))
        self._room = context_length - len(self._before) - len(self._after)
        if self._room < 1:
            raise UserError(f"model.length is {context_length}: the prompt alone takes {context_length - self._room}")

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Questions -> int64 (n, context_length)."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.full((len(texts), self.context_length), self.padding, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            found = [*self._before, *self._ids(f" {text}")[: self._room], *self._after]
            row[len(row) - len(found) :] = torch.tensor(found)
        return ids

    def answers(self, texts: Sequence[str], length: int) -> Int64[Tensor, "n length"]:
        """Answers and their end token, cut; `IGNORED` behind them."""
        ids = torch.full((len(texts), length), IGNORED, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            found = [*self._ids(f" {text}")[: length - 1], self.end]
            row[: len(found)] = torch.tensor(found)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return str(self.inner.decode(ids, skip_special_tokens=True)).strip()

    def _ids(self, text: str) -> list[int]:
        return list(self.inner(text, add_special_tokens=False).input_ids) if text.strip() else []


class Language(nn.Module):
    """A causal language model.

    Args:
        net: transformers' model.
        files: its config.json and tokenizer, as text.
        lora: `{rank, alpha}` of adapters beside all linear layers but the last one (arXiv:2106.09685); None: none.
        frozen: its own weights stay as they are.

    Raises:
        UserError: peft is missing, or a number is out of range.
    """

    def __init__(
        self, net: nn.Module, files: Mapping[str, str], *, lora: Mapping[str, Any] | None = None, frozen: bool = True
    ) -> None:
        super().__init__()
        self.files, self.lora, self.frozen = dict(files), None if lora is None else dict(lora), frozen
        made: Any = net.float()
        if lora is not None:
            _adapt(made, **lora)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("lora_" in name or not frozen)
        self.net = made
        self.embed: nn.Embedding = made.get_input_embeddings()
        self.dim = int(self.embed.weight.shape[1])
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:  # no dropout around what does not change
            self.net.eval()
        return self

    def tokens(self, prompt: str, length: int) -> LanguageTokens:
        """Its tokenizer for prompts of `length` tokens."""
        return LanguageTokens(_from_files(self.files, "tokenizer"), prompt, length)

    @classmethod
    def from_files(cls, files: Mapping[str, str], **options: Any) -> Language:
        """With random weights."""
        return cls(_from_files(files, "model"), files, **options)


def load_language(folder: str, *, lora: Mapping[str, Any] | None = None, frozen: bool = True) -> Language:
    """The model in a folder: config.json, a tokenizer, and weights as .safetensors.

    Args:
        folder: as transformers' `save_pretrained` writes it.
        lora: see `Language`, as is `frozen`.
        frozen: see there.

    Raises:
        UserError: transformers is missing; no such folder; a file is missing, damaged, or asks for code of its own.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise UserError(
            f"model.language.folder={folder} has no config.json: give a local folder of a Hugging Face causal language "
            "model (config.json, tokenizer.json, *.safetensors); nothing is fetched"
        )
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"model.language.folder={folder} has no weights as .safetensors (pickles may hold code, and are not read): "
            "save them with safe_serialization"
        )
    files = read_files(path)
    _transformers()
    with tempfile.TemporaryDirectory(prefix="medclip-") as checked:
        write_files(files, Path(checked))  # refuses what asks for code
    _from_files(files, "tokenizer")
    try:
        from transformers import AutoModelForCausalLM

        with _without_bars():
            net = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, use_safetensors=True, attn_implementation="eager"
            )
    except Exception as error:  # parsers of several libraries
        raise UserError(
            f"model.language.folder={folder} holds no causal language model that can be read ({first_line(error)})"
        ) from error
    return Language(net, files, lora=lora, frozen=frozen)


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError("model=vqa_generate needs transformers: pip install 'medclip-adapt[hf]'") from error


def _from_files(files: Mapping[str, str], what: str) -> Any:
    _transformers()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="medclip-") as folder:
        write_files(files, Path(folder))
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            if what == "tokenizer":
                return AutoTokenizer.from_pretrained(folder, **options)
            config = AutoConfig.from_pretrained(folder, **options)
            # Explicit attention is there for every architecture, and says where it looked.
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")
        except Exception as error:  # parsers of several libraries
            raise UserError(f"model.language: its {what} cannot be read ({first_line(error)}): get it again") from error


def _adapt(net: Any, rank: int = 8, alpha: float = 16) -> None:
    if rank < 1 or alpha <= 0:
        raise UserError(f"model.language.lora is rank {rank}, alpha {alpha}: give 1 or more, and an alpha above 0")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("model.language.lora needs peft: pip install 'medclip-adapt[lora]'") from error
    from transformers.pytorch_utils import Conv1D

    last = net.get_output_embeddings()
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not last}
    turned = any(isinstance(module, Conv1D) for module in layers.values())  # GPT-2 keeps its weights transposed
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), fan_in_fan_out=turned)  # type: ignore[arg-type]
    inject_adapter_in_model(config, net)
