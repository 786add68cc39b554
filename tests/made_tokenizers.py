"""Tokenizers that are made here, of both kinds that count: byte-level, and with byte fallback."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "Grüße aus Köln! The window decides; the window is what decides.\nEine Zeile. 😀 two  spaces\n" * 3


def save_byte_level(folder: Path) -> Any:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return _saved(tokenizer, folder)


def save_byte_fallback(folder: Path) -> Any:
    pieces = {f"<0x{number:02X}>": number + 1 for number in range(256)}
    words = sorted({character for character in TEXT if character.isascii() and character.isprintable()} - {" "})
    vocabulary = {"<end>": 0} | pieces | {word: 257 + number for number, word in enumerate(["▁", *words])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _saved(tokenizer, folder)


def _saved(tokenizer: Any, folder: Path) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    return fast
