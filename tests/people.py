"""Small directories such as people bring: sentence encoders with modules of their own, heads without weights, GPT-2."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers as tf

from nogemm import cli

WORDS = ["fast", "slow", "table", "search", "text", "of", "a", "the"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
TEXTS = ["a fast table", "slow search of the text", "the", "of of of a text the slow table", "search"]
SMALL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.5,
}
# A dense layer instead of the dense one: the same function, so that outputs can be compared.
SAME = ("--method", "dense", "--set", "hidden=32", "--set", "activation=gelu")


def run(*words: object) -> int:
    """Run a command as the shell would; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return int(ended.value.code or 0)


def tokenizer(folder: Path) -> Any:
    """Make a tokenizer of whole words, BERT's kind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return tf.BertTokenizer(str(folder / "vocab.txt"))


def bert(folder: Path, cls: str = "BertModel", **kwargs: Any) -> Path:
    """Save a small BERT with its tokenizer."""
    torch.manual_seed(0)
    getattr(tf, cls)(tf.BertConfig(**SMALL), **kwargs).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    return folder


def reranker(folder: Path) -> Path:
    """Save a small cross-encoder: BERT with one logit."""
    torch.manual_seed(0)
    config: Any = tf.BertConfig(**SMALL)
    config.num_labels = 1
    tf.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    return folder


def gpt2(folder: Path, cls: str = "GPT2LMHeadModel") -> Path:
    """Save a small GPT-2 with a tokenizer that has no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate([*WORDS, "<|endoftext|>"])}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    end = words["<|endoftext|>"]
    config = tf.GPT2Config(n_embd=16, n_inner=32, n_layer=2, n_head=2, vocab_size=len(words), n_positions=40)
    config.bos_token_id = config.eos_token_id = end
    config.initializer_range = 0.5
    getattr(tf, cls)(config).save_pretrained(folder)
    tf.PreTrainedTokenizerFast(tokenizer_object=words_only, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def relu_decoder(folder: Path) -> Path:
    """Save a small OPT with the tokenizer of `gpt2`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gpt2(folder.with_name(folder.name + "-tokenizer")))
    torch.manual_seed(0)
    config = tf.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40, init_std=0.5, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    tf.OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence_encoder(folder: Path, *modules: Any, mode: Any = "mean", **kwargs: Any) -> Path:
    """Save a SentenceTransformer: a small BERT, a pooling, and more modules."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    source = bert(folder.with_name(folder.name + "-transformer"))
    pooling = Pooling(16, pooling_mode=mode)
    model = SentenceTransformer(modules=[Transformer(str(source)), pooling, *modules], device="cpu", **kwargs)
    model.save(str(folder))
    return folder


def encoded(folder: Path, texts: list[str] | None = None) -> Any:
    """Embed as the directory's own SentenceTransformer does, scaled to length one."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(texts or TEXTS, normalize_embeddings=True)


def edit(file: Path, **changes: Any) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def pairs_file(folder: Path, repeat: int = 1) -> Path:
    """Write pairs of texts that `distil` and `eval` read; `repeat` makes them long."""
    path = folder / "pairs.jsonl"
    rows = [{"short": f"{a} {b}", "long": " ".join([f"the {b} of a {a} text"] * repeat)} for a in WORDS for b in WORDS]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
