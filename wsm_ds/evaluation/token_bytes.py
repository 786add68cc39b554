"""How many bytes of text each token of a vocabulary stands for: what bits per byte need where only tokens are known."""

import re
from typing import Any

import numpy as np

from wsm_ds.evaluation.token_files import Tokens

BYTE_LEVEL = '"ByteLevel"'
"""The name, in tokenizer.json, of the parts that write each byte of a text as one character."""
BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"
"""Stands for a space in the vocabularies of SentencePiece."""


def bytes_of_tokens(tokenizer: Any) -> Tokens:
    """The bytes of every token's text.

    They are exact for byte-level vocabularies (GPT-2, Llama 3, Qwen). Those of SentencePiece (Llama 2) count a space
    before the first word, which the text may not have. Special tokens have no bytes.

    Args:
        tokenizer: a fast tokenizer of the transformers library.

    Returns:
        int64, shape [size of the vocabulary].
    """
    is_byte_level = BYTE_LEVEL in tokenizer.backend_tokenizer.to_str()
    special = set(tokenizer.all_special_ids)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    nbytes = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int64)
    for text, number in vocabulary.items():
        if number in special:
            continue
        if number in added:
            nbytes[number] = len(added[number].encode())
        elif is_byte_level:
            nbytes[number] = len(text)
        else:
            nbytes[number] = 1 if BYTE_FALLBACK.fullmatch(text) else len(text.replace(SPACE, " ").encode())
    return nbytes
