"""Load models and tokenizers from the disk: the one place that every command loads by.

A weight that the model needs and the files lack is an error, never a random number; see `load_model`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nogemm.errors import CheckpointError, ConfigError, NogemmError
from nogemm.models.directory import model_directory, transformer_directory
from nogemm.models.texts import prepare_tokenizer

NAMED = "named"
_AUTO = {
    "search": "AutoModel",
    "mlm": "AutoModelForMaskedLM",
    "clm": "AutoModelForCausalLM",
    "classify": "AutoModelForSequenceClassification",
}


def load_model(
    path: str | Path,
    head: str = NAMED,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a transformers model, converted or not, in evaluation mode, from the disk alone.

    Args:
        path: a directory, a GGUF file, a name in the local Hugging Face cache, or all-MiniLM-L6-v2. A GGUF file is a
            causal language model, whose quantised weights become numbers of `dtype`, float32 by default.
        head: "search": the base model. "mlm", "clm", "classify": with that head. "named": the class that its config
            names; where the files hold no weight of that class's head, the base model, with a warning.
        dtype: of the weights; None keeps the stored one.
        trust_remote_code: run the code that the directory brings for a class that transformers does not have.
    Raises:
        ConfigError: no model there, or its code is not trusted.
        CheckpointError: the files lack weights. Tied weights are not missing; nor is a pooler that nothing here uses,
            which is left out.
    """
    if is_gguf(path):
        model = _load_gguf(path, "AutoModelForCausalLM", dtype=torch.float32)  # in 16 bits it would stay packed
        return _plain(model).to(dtype or torch.float32).eval()
    root = model_directory(path)
    folder = transformer_directory(root)
    common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with _quiet(), _named_trust(path), _refusing(path):
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, **common)
        cls = _class(config, head, trust_remote_code)
        if dtype is not None:
            common["dtype"] = dtype
        model, info = cls.from_pretrained(folder, output_loading_info=True, **common)
        missing = _without_pooler(model, set(info["missing_keys"]))
        if head == NAMED and _head_is_missing(model, missing):
            warnings.warn(
                f"{path}: config.json names {type(model).__name__}, but the files have no weights of its head; the "
                "base model is loaded",
                stacklevel=2,
            )
            model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, **common)
            missing = _without_pooler(model, set(info["missing_keys"]))
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        raise CheckpointError(
            f"{path}: the files lack weights of {type(model).__name__}: {', '.join(names[:6])}{more}. If they hold "
            "another class, name it under architectures in config.json"
        )
    return model.eval()


def has_classifier(path: str | Path, *, trust_remote_code: bool = False) -> bool:
    """Tell whether the directory's config names a model with a classification head."""
    import transformers

    folder = transformer_directory(model_directory(path))
    with _named_trust(path), _refusing(path):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    return (getattr(config, "architectures", None) or [""])[0].endswith("ForSequenceClassification")


def load_with_new_head(
    path: str | Path, settings: Mapping[str, Any], *, seed: int, trust_remote_code: bool = False
) -> Any:
    """Load a model in float32 with a classification head whose weights are drawn as transformers draws them.

    Args:
        path: as `load_model` takes it; a head that the files hold is not used.
        settings: of the config, such as num_labels and id2label.
        seed: of the head's weights.
    Raises:
        ConfigError: no model there, or none that can have such a head. CheckpointError: the files lack other weights.
    """
    import transformers

    folder = transformer_directory(model_directory(path))
    common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code, "dtype": torch.float32}
    with _quiet(), _named_trust(path), _refusing(path):
        try:
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **common, **settings
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ConfigError(f"{path}: transformers has no classification head for this model") from error
    base = {id(module) for module in model.base_model.modules()}
    names = dict(model.named_parameters(remove_duplicate=False))
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    wrong = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    lacking = [name for name in wrong if name in names and id(names[name]) in inside and ".pooler." not in name]
    if lacking:
        raise CheckpointError(f"{path}: the files lack weights of {type(model).__name__}: {', '.join(sorted(lacking))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            pooler = any(f"{name}.{part}" in wrong for part, _ in module.named_parameters(recurse=False))
            if (id(module) not in base and module is not model) or pooler:
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # transformers' own mark
                model._init_weights(module)
    return model.eval()


def load_encoder(path: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Load the encoder alone, without a head, in float32."""
    return load_model(path, "search", dtype=torch.float32, trust_remote_code=trust_remote_code)


def load_both(path: str | Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load the model of the class that its config names, and its tokenizer; each knows the padding of the other."""
    model = load_model(path, trust_remote_code=trust_remote_code)
    return model, prepare_tokenizer(load_tokenizer(path, trust_remote_code=trust_remote_code), model)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that lies beside a model, ready to pad (see `prepare_tokenizer`)."""
    import transformers

    if is_gguf(path):
        return prepare_tokenizer(_load_gguf(path, "AutoTokenizer"))
    folder = transformer_directory(model_directory(path))
    with _named_trust(path), _refusing(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    if not getattr(tokenizer, "vocab_size", 1):  # made up by transformers where the model's kind names a class
        raise ConfigError(f"{path}: there is no tokenizer; save it beside the model (tokenizer.save_pretrained)")
    return prepare_tokenizer(tokenizer)


def is_gguf(path: str | Path) -> bool:
    """Tell a GGUF file, as llama.cpp writes them, by its ending."""
    return Path(path).suffix.lower() == ".gguf"


def _load_gguf(path: str | Path, auto: str, **more: Any) -> Any:
    """Read a model or a tokenizer out of a GGUF file.

    Raises:
        ConfigError: there is no such file, or the package that reads them is not installed.
        CheckpointError: the file is truncated, or of a kind that transformers does not know.
    """
    import transformers

    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path}: there is no such file")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{path}: GGUF files are read by the package gguf: pip install 'nogemm[decoder]'")
    try:
        with _quiet(), _without_bar():
            return getattr(transformers, auto).from_pretrained(
                str(file.parent), gguf_file=file.name, local_files_only=True, **more
            )
    except Exception as error:  # the reader raises what its parts raise: ValueError, KeyError, struct.error, ...
        raise CheckpointError(
            f"{path}: transformers cannot read this GGUF file of {file.stat().st_size:,} bytes, which may be cut "
            f"short: {error or type(error).__name__}"
        ) from error


def _plain(model: Any) -> Any:
    """Take off the marks of a quantised model: its weights are ordinary numbers by now, to be cast and saved."""
    model.hf_quantizer, model.is_quantized = None, False
    for owner, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    return model


def _class(config: Any, head: str, trusted: bool) -> Any:
    """Return the class to load: one of transformers, or the Auto class that leads to the directory's own code."""
    import transformers

    names = getattr(config, "architectures", None) or [""]
    own = getattr(transformers, names[0], None) if names[0] else None
    own = own if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel) else None
    if head == "search" and own is not None and names[0].endswith("EncoderModel"):
        return own  # the encoder of an encoder-decoder, whose base model would want a decoder's weights
    if head != NAMED:
        return getattr(transformers, _AUTO[head])
    brought = [
        auto
        for auto, reference in (getattr(config, "auto_map", None) or {}).items()
        if auto.startswith("AutoModel") and str(reference).rpartition(".")[2] == names[0]
    ]
    if brought and (trusted or own is None):
        return getattr(transformers, brought[0])
    return own or transformers.AutoModel


def _without_pooler(model: nn.Module, missing: set[str]) -> set[str]:
    """Take a pooler without weights off a model that may do without one; return what else is missing."""
    poolers = {name for name in missing if name.startswith("pooler.")}
    if poolers and "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.pooler = None  # type: ignore[assignment]
        return missing - poolers
    return missing


def _head_is_missing(model: Any, missing: set[str]) -> bool:
    """Say whether the model has a head and none of the head's own weights came from the files."""
    base = model.base_model
    if base is model or not missing:
        return False
    shared = {id(parameter) for parameter in base.parameters()}
    names = dict(model.named_parameters(remove_duplicate=False))
    head = {id(parameter) for parameter in names.values()} - shared
    absent = {id(names[name]) for name in missing if name in names}
    return bool(head) and head <= absent


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers while it loads: its table of missing weights and its bars would stand between our lines."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Silence the bar over a GGUF file's tensors, which transformers draws whatever it is told."""
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = reader.tqdm
    reader.tqdm = lambda items, **settings: items
    try:
        yield
    finally:
        reader.tqdm = bar


@contextmanager
def _refusing(path: str | Path) -> Iterator[None]:
    """Make what transformers' parts stumble over in a damaged file an error that says so.

    Its own refusals, which are an OSError, a ValueError or an ImportError, stay as they are.
    """
    try:
        yield
    except (NogemmError, OSError, ValueError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: transformers cannot load this model ({type(error).__name__}: {error}). Was config.json or a "
            "weight file edited or damaged?"
        ) from error


@contextmanager
def _named_trust(path: str | Path) -> Iterator[None]:
    """Say how to allow a directory's own code, in our words."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(
            f"{path}: the model runs code of its own directory. Read it; --trust-remote-code "
            "(trust_remote_code=True) allows it"
        ) from error
