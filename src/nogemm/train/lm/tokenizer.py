"""A tokenizer learnt from the data: byte-level BPE, so that every text can be written in its tokens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nogemm.errors import ConfigError
from nogemm.train.errors import DataError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # the numbers that RoBERTa gives them
LEAST = 256 + len(SPECIAL)
"""Tokens of the smallest vocabulary: the bytes and the special tokens."""
CHARACTERS = 50_000_000
"""Of the data's beginning that a tokenizer is learnt from; more changes little and takes long."""


def train_tokenizer(texts: Iterable[str], size: int = 8192, *, framed: bool = True) -> Any:
    """Learn byte-level BPE from the beginning of `texts` (50 million characters).

    Args:
        texts: read once, as far as needed.
        size: tokens of the vocabulary, at least 261; fewer where the texts hold fewer pairs.
        framed: whether a text gets <s> and </s> around it, as encoders expect; a pair of texts gets </s></s> between.
    Returns:
        a transformers tokenizer, whose special tokens are <s>, <pad>, </s>, <unk> and <mask>.
    Raises:
        ConfigError: `size` is too small. DataError: there is no text.
    Cost: about a second for a million characters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if size < LEAST:
        raise ConfigError(f"train_tokenizer: size must be at least {LEAST}, got size={size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_beginning(texts), trainer)
    if framed:
        ends = [(word, bpe.token_to_id(word)) for word in ("<s>", "</s>")]
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
        )
    start, pad, end, unknown, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=start, pad_token=pad, eos_token=end, unk_token=unknown, mask_token=mask,
        cls_token=start, sep_token=end,
    )  # fmt: skip


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer into a new directory, made visible by one rename."""
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beginning(texts: Iterable[str]) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= CHARACTERS:
            return
    if seen == 0:
        raise DataError("the data holds no text to learn a tokenizer from")
