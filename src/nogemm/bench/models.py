"""Load the models that are measured, and record what a converted layer sees in one.

Everything is read from directories on the disk (see `nogemm.models.loading`); nothing is fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.sites import converted, record_sites
from nogemm.errors import ConfigError
from nogemm.models.depth import keep_layers, spread_numbers
from nogemm.models.directory import PACKAGED
from nogemm.models.embed import batches
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.train.sources import load_split

# Published shapes, for timing alone: the config's class, and what differs from its defaults.
RANDOM: dict[str, tuple[str, dict[str, int]]] = {
    "bert-base": ("BertConfig", {}),
    "roberta-base": (
        "RobertaConfig",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
}


def is_published_shape(path: str | Path) -> bool:
    """Say whether a name stands for a published shape with random weights."""
    return str(path) in RANDOM and not Path(path).exists()


def timed_encoder(path: str | Path, seed: int = 0) -> nn.Module:
    """Load an encoder, or make one of a published shape with random weights, which runs as fast as a trained one."""
    if not is_published_shape(path):
        return load_encoder(path)
    import transformers

    name, fields = RANDOM[str(path)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModel.from_config(getattr(transformers, name)(**fields)).float().eval()


def timed_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer beside a model; a shape with random weights reads the ids of the packaged model's."""
    return load_tokenizer(PACKAGED if is_published_shape(path) else path)


def spread_layers(model: nn.Module, count: int) -> tuple[int, ...]:
    """Keep `count` of an encoder's layers, evenly spread, the first and the last among them; in place.

    Returns:
        the numbers of those that are kept.
    Raises:
        ConfigError: the model has fewer, or not one list of layers.
    """
    config: Any = model.config
    layers = int(config.num_hidden_layers)
    if not 1 <= count <= layers:
        raise ConfigError(f"--layers {count}: the dense model has {layers}")
    kept = spread_numbers(layers, count)
    keep_layers(model, kept)
    return kept


def sample_texts(limit: int) -> list[str]:
    """Return the first texts of the packaged sample's test split, documents only."""
    return load_split("sample", "test").documents[:limit]


def site_inputs(path: str | Path, site: int, *, tokens: int = 32_768, seed: int = 0) -> Tensor:
    """Run the packaged sample through a model and return what converted layer number `site` gets, [N, D].

    Raises:
        ConfigError: the model has no such layer.
    """
    model, tokenizer = load_encoder(path), load_tokenizer(path)
    names = list(converted(model))
    if not 0 <= site < len(names):
        raise ConfigError(f"--site {site}: {path} has {len(names)} converted layers, numbered from 0")
    rows: list[Tensor] = []
    with torch.inference_mode(), record_sites(model, [names[site]]) as seen:
        for _, inputs in batches(tokenizer, sample_texts(2_000), 256, 4096, model):
            model(**inputs)
            x = seen[names[site]][0]
            rows.append(x.reshape(-1, x.shape[-1])[inputs["attention_mask"].reshape(-1).bool()].float().clone())
            if sum(len(part) for part in rows) >= tokens:
                break
    return torch.cat(rows)[:tokens]
