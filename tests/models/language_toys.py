"""A tiny language model with random weights and a tokenizer of words, written as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TEXT = "question answer : is there a lung what organ this yes no left red green blue heart in the picture"


def language_folder(folder: Path, words: Sequence[str] = (), *, kind: str = "llama", start: bool = True) -> Path:
    """Of two layers and 32 channels; of the kind gpt2 it has learned positions and transposed weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(words or TEXT.split())])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    names = {"unk_token": "<unk>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if start else {})
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    torch.manual_seed(0)
    ends: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    ends |= {"initializer_range": 0.3}  # so that it does not repeat its first word for ever
    if kind == "gpt2":
        net = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **ends))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        net = LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **sizes, **ends))
    net.save_pretrained(folder)
    return folder
