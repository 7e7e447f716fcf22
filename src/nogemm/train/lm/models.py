"""The model that a run trains: new, from a config, or from a checkpoint; its FFNs replaced, its size and cost counted.

Reading order: `make_model`, `new_model`, `flops_per_token`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nogemm.convert import convert, converted
from nogemm.errors import ConfigError
from nogemm.heads import HireHead, output_embeddings
from nogemm.layers import FFN
from nogemm.models.loading import load_model
from nogemm.models.texts import positions
from nogemm.train.lm.options import TrainOptions

_CLASSES = {"mlm": "AutoModelForMaskedLM", "clm": "AutoModelForCausalLM"}
# How configs of transformers call the same thing; the first name that a config has is taken.
_NAMES = {
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "hidden": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim"),
    "activation": ("hidden_act", "activation_function", "hidden_activation", "activation"),
    "positions": ("max_position_embeddings", "n_positions"),
}
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "hidden_dropout", "embedding_dropout", "mlp_dropout",
)  # fmt: skip


def make_model(
    options: TrainOptions, source: nn.Module | str | Path | None, tokenizer: Any, *, trust_remote_code: bool = False
) -> Any:
    """Return the model to train, its FFNs replaced as `options.ffn` says.

    Args:
        source: a model; the directory or the cached name of a checkpoint; a JSON file of a transformers config, whose
            weights are drawn; None: a new model of `options.arch`.
        tokenizer: whose tokens it has to know.
    Raises:
        ConfigError: no such architecture, or the model knows too few tokens or positions.
        CheckpointError: the checkpoint lacks weights.
    """
    torch.manual_seed(options.seed)
    if source is None:
        model = new_model(options, tokenizer)
    elif isinstance(source, nn.Module):
        model = source
    elif Path(source).suffix == ".json" and Path(source).is_file():
        model = _from_config(options, Path(source))
    else:
        try:
            model = load_model(source, options.task, dtype=torch.float32, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ConfigError(f"train: {source} is no model for task={options.task!r}") from error
    _check_fit(model, options, tokenizer)
    if options.ffn is not None:
        convert(model, options.ffn, faster_at=None)
    return model


def new_model(options: TrainOptions, tokenizer: Any) -> Any:
    """Make a model of `options.arch` and its sizes, weights drawn.

    Raises:
        ConfigError: transformers does not know the architecture, or has no such model for the task.
    """
    from transformers import AutoConfig

    try:
        default = AutoConfig.for_model(options.arch)
    except (ValueError, KeyError):
        raise ConfigError(
            f"train: arch must be a model type of transformers, such as roberta, llama or gpt2, got {options.arch!r}"
        ) from None
    wanted: dict[str, Any] = {
        "width": options.width,
        "layers": options.layers,
        "heads": options.heads,
        "hidden": options.hidden or 4 * options.width,
        # RoBERTa's family numbers positions from behind the padding token.
        "positions": options.context + (tokenizer.pad_token_id + 1 if "roberta" in options.arch else 0),
    }
    if options.activation is not None:
        wanted["activation"] = options.activation
    known: dict[str, Any] = {}
    for what, value in wanted.items():
        name = next((name for name in _NAMES[what] if hasattr(default, name)), None)
        if name is None and what != "positions":
            raise ConfigError(f"train: the config of {options.arch} has no place for {what}={value!r}")
        if name is not None:
            known[name] = value
    if options.dropout is not None:
        known |= {name: options.dropout for name in _DROPOUTS if hasattr(default, name)}
    if hasattr(default, "num_key_value_heads"):
        known["num_key_value_heads"] = options.heads
    if hasattr(default, "head_dim"):
        known["head_dim"] = options.width // options.heads
    if options.tie is not None:
        known["tie_word_embeddings"] = options.tie
    for part in ("pad", "bos", "eos", "cls", "sep", "mask"):
        if part in ("pad", "bos", "eos") or hasattr(default, f"{part}_token_id"):
            known[f"{part}_token_id"] = getattr(tokenizer, f"{part}_token_id")
    config = AutoConfig.for_model(options.arch, vocab_size=len(tokenizer), **known)
    return _drawn(options, config)


def _from_config(options: TrainOptions, path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return _drawn(options, AutoConfig.from_pretrained(path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: not a config that transformers reads: {error}") from error


def _drawn(options: TrainOptions, config: Any) -> Any:
    import transformers

    try:
        model = getattr(transformers, _CLASSES[options.task]).from_config(config)
    except ValueError as error:
        raise ConfigError(
            f"train: transformers has no {_CLASSES[options.task]} of {config.model_type}: task={options.task!r} needs "
            "another architecture"
        ) from error
    return model


def _check_fit(model: Any, options: TrainOptions, tokenizer: Any) -> None:
    """Raise ConfigError unless the model is one of the task that knows the tokens and the positions."""
    head = output_embeddings(model)
    if head is None:
        raise ConfigError(f"train: {type(model).__name__} has no vocabulary head to guess tokens with")
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ConfigError(
            f"train: the model knows {rows:,} tokens and the tokenizer makes {len(tokenizer):,}: give the tokenizer "
            "that belongs to the model"
        )
    limit = positions(model)
    if limit is not None and limit < options.context:
        raise ConfigError(f"train: the model has {limit} positions, fewer than context={options.context}")


def flops_per_token(model: Any, context: int, guessed: int) -> dict[str, float]:
    """Return the FLOP of a token's forward pass in training, by what does them.

        ffn = as declared (of replaced FFNs),  attention = 4 L D per layer,  head = 2 V D guessed / L,  linear = 2 |W|

    Args:
        context: L, tokens that the model sees at once.
        guessed: of them, whose logits are computed.
    Returns:
        {"ffn", "attention", "head", "linear", "total"}; a backward pass takes about twice as many.
    """
    ours = converted(model)
    inside = {id(part) for layer in ours.values() for part in layer.modules()}
    head = output_embeddings(model)
    linear = sum(
        part.weight.numel()
        for part in model.modules()
        if id(part) not in inside and part is not head and _is_matrix(part)
    )
    config: Any = model.config
    depth, width = int(config.num_hidden_layers), int(config.hidden_size)
    parts: dict[str, float] = {
        "ffn": sum(layer.cost(1).flops for layer in ours.values()),
        "attention": 4.0 * context * width * depth,
        "head": 2.0 * head.weight.numel() * guessed / context,
        "linear": 2.0 * linear,
    }
    return parts | {"total": sum(parts.values())}


def _is_matrix(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return (
        isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(part, (nn.Embedding, FFN, HireHead))
    )
