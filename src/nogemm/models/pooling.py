"""From a text's hidden states to its embedding, as the model's directory describes it.

`modules.json` of sentence-transformers decides: which tokens are pooled and what follows (a dense layer, a LayerNorm).
A plain transformers directory has none; there the embedding is the mean over the text's tokens. In the end every
embedding is scaled to length one.

Legend: S texts, L tokens of the longest, D width, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nogemm.errors import ConfigError
from nogemm.files import parse_json
from nogemm.models.directory import find_directory, root_directory, sentence_modules
from nogemm.models.inner import inner_model

Step = Callable[[Tensor], Tensor]
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Before sentence-transformers 5.4, pooling was described by one flag per mode.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """How hidden states become an embedding.

    Attributes:
        modes: of `MODES`; several are put side by side.
        steps: what follows, in order, each [S, *] -> [S, *].
        max_length: longer texts are cut to so many tokens; None leaves that to the tokenizer.
    """

    modes: tuple[str, ...] = ("mean",)
    steps: tuple[Step, ...] = ()
    max_length: int | None = None

    def __call__(self, hidden_SLD: Tensor, mask_SL: Tensor) -> Tensor:
        """Return the embeddings before they are scaled, [S, E]."""
        found = torch.cat([_pool(mode, hidden_SLD, mask_SL) for mode in self.modes], dim=-1)
        for step in self.steps:
            found = step(found)
        return found


MEAN = Pooling()


def pooled(hidden_SLD: Tensor, mask_SL: Tensor, pooling: Pooling = MEAN) -> Tensor:
    """Return the embeddings of texts, scaled to length one: [S, E]. With the mean:

    e = m / |m|,  m = sum_l mask[l] h[l] / sum_l mask[l]
    """
    return F.normalize(pooling(hidden_SLD, mask_SL), dim=-1)


def pooling_of(*models: nn.Module | str | Path) -> Pooling:
    """Return the pooling of the first model that describes one; the mean if none does.

    Args:
        models: directories, names, SentenceTransformers, or transformers models, which remember their directory.
    Raises:
        ConfigError: a description that cannot be followed; it names the module.
    """
    for model in models:
        found = _described(model)
        if found is not None:
            return found
    return MEAN


def _described(model: nn.Module | str | Path) -> Pooling | None:
    if isinstance(model, nn.Module):
        if inner_model(model) is not model:
            limit = getattr(model, "max_seq_length", None)
            return _assemble(type(model).__name__, _live_modules(model), limit)
        model = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    found = find_directory(model) if str(model) else None
    if found is None:
        return None
    root = root_directory(found)
    modules = sentence_modules(root)
    limits = list(Path(root, modules[0]["path"] if modules else "").glob("sentence_*_config.json"))
    limit = _read_json(limits[0]).get("max_seq_length") if limits else None
    return _assemble(root, _stored_modules(root, modules), limit) if modules else None


@dataclass(frozen=True)
class _Module:
    """One module behind the transformer: its class, where it was found, its settings and its weights."""

    kind: str
    where: str
    settings: Mapping[str, Any]
    weights: Callable[[], Mapping[str, Tensor]]


def _live_modules(model: nn.Module) -> Iterator[_Module]:
    for index, module in enumerate(model.children()):
        if index:
            read: Any = getattr(module, "get_config_dict", dict)
            kind = f"{type(module).__module__}.{type(module).__name__}"
            yield _Module(kind, type(module).__name__, read(), module.state_dict)


def _stored_modules(root: str, modules: list[dict[str, Any]]) -> Iterator[_Module]:
    for module in modules[1:]:
        folder = Path(root) / module["path"]
        settings = _read_json(folder / "config.json") if module["path"] else {}

        def weights(folder: Path = folder) -> Mapping[str, Tensor]:
            from safetensors.torch import load_file

            if not (folder / "model.safetensors").is_file():
                raise ConfigError(
                    f"{folder}: no model.safetensors; save the model again with sentence-transformers, which writes it"
                )
            return load_file(folder / "model.safetensors")

        yield _Module(module["type"], str(folder), settings, weights)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(parse_json(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: not a JSON object") from error


def _assemble(whose: str, modules: Iterator[_Module], limit: Any) -> Pooling:
    modes: tuple[str, ...] = ()
    steps: list[Step] = []
    for module in modules:
        kind = module.kind.rpartition(".")[2] if module.kind.startswith("sentence_transformers.") else ""
        tokens = module.settings.get("module_input_name", "sentence_embedding") != "sentence_embedding"
        if kind == "Pooling" and not modes:
            modes = _modes(module)
        elif kind in _STEPS and modes and not tokens:
            steps += _STEPS[kind](module)
        else:
            raise ConfigError(
                f"{whose}: embeddings pass through {module.kind.rpartition('.')[2]}, which nogemm cannot follow there. "
                "It follows Pooling, then Dense, LayerNorm, Normalize; without modules.json it takes the mean"
            )
    if not modes:
        raise ConfigError(f"{whose}: modules.json names no Pooling; without that file the mean is taken")
    return Pooling(modes, tuple(steps), limit if isinstance(limit, int) else None)


def _modes(module: _Module) -> tuple[str, ...]:
    named = module.settings.get("pooling_mode")
    if named is None:
        named = [mode for flag, mode in _FLAGS.items() if module.settings.get(flag)] or ["mean"]
    modes = (named,) if isinstance(named, str) else tuple(named)
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ConfigError(f"{module.where}: pooling_mode {unknown[0]!r} is not one of {', '.join(MODES)}")
    return modes


def _dense(module: _Module) -> list[Step]:
    """y = act(W x + b), and x or a projection of x added if the settings say so."""
    state = {name: value.detach() for name, value in module.weights().items()}
    path = str(module.settings.get("activation_function", "torch.nn.Tanh"))
    kind = getattr(nn, path.rpartition(".")[2], None) if path.startswith("torch.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"{module.where}: the activation {path!r} is not one of torch.nn")
    activation = kind()
    residual = bool(module.settings.get("use_residual"))

    def step(x: Tensor) -> Tensor:
        y = activation(F.linear(x, state["linear.weight"].to(x), _moved(state.get("linear.bias"), x)))
        if not residual:
            return y
        return y + (F.linear(x, state["residual.weight"].to(x)) if "residual.weight" in state else x)

    return [step]


def _layer_norm(module: _Module) -> list[Step]:
    state = {name: value.detach() for name, value in module.weights().items()}
    weight, bias = state["norm.weight"], state["norm.bias"]
    return [lambda x: F.layer_norm(x, weight.shape, weight.to(x), bias.to(x))]


def _moved(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.to(like)


_STEPS: dict[str, Callable[[_Module], list[Step]]] = {
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": lambda module: [lambda x: F.normalize(x, dim=-1)],
    "Dropout": lambda module: [],
}


def _pool(mode: str, hidden_SLD: Tensor, mask_SL: Tensor) -> Tensor:
    """Pool over the tokens of each text, wherever its padding lies."""
    mask = mask_SL.unsqueeze(-1).to(hidden_SLD.dtype)
    if mode == "max":
        return hidden_SLD.masked_fill(mask == 0, float("-inf")).amax(1)
    length = hidden_SLD.shape[1]
    if mode in ("cls", "lasttoken"):
        first = mask_SL.int().argmax(1)
        place = first if mode == "cls" else length - 1 - mask_SL.flip(1).int().argmax(1)
        return hidden_SLD[torch.arange(len(place), device=place.device), place]
    if mode == "weightedmean":  # the first token counts once, the second twice, and so on
        mask = mask * (mask_SL.cumsum(1)).unsqueeze(-1).to(hidden_SLD.dtype)
    count = mask.sum(1).clamp_min(1e-9)
    return (hidden_SLD * mask).sum(1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)
