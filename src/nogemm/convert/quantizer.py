"""transformers' side of the checkpoint format; imports transformers, so only the hook in `checkpoint.py` loads it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nogemm.config import LayerConfig, head_config, layer_config
from nogemm.convert import checkpoint
from nogemm.convert.convert import convert
from nogemm.convert.fitted import mark_random, warn_if_random
from nogemm.convert.save import refuse_quantised
from nogemm.convert.sites import Installed, Site, converted, installed, survey
from nogemm.convert.token_ids import connect
from nogemm.errors import CheckpointError, ConfigError, PackedError
from nogemm.heads import HeadConfig, HireHead, head_of, output_embeddings
from nogemm.layers import PackedFFN
from nogemm.ops._threads import in_passing

SAVE_PACKED = (
    "a packed model is for evaluation only and cannot be saved: save before packing, or pack a copy. "
    "After nogemm.pack(model, keep=True), nogemm.unpack(model) brings the unpacked weights back"
)


class NogemmConfig(QuantizationConfigMixin):
    """What to convert while loading: `from_pretrained(dense, quantization_config=NogemmConfig(LookupConfig()))`.

    Also the form in which a converted model's config.json is read back.

    Args:
        config: a layer config, or {glob: layer config}, as in `nogemm.convert`.
        layers: "all", indices or globs, as in `nogemm.convert`.
    """

    def __init__(
        self,
        config: LayerConfig | Mapping[str, LayerConfig] | None = None,
        layers: str | int | Sequence[str | int] = "all",
        **stored: Any,
    ) -> None:
        stored.pop("quant_method", None)
        self.quant_method = checkpoint.METHOD  # type: ignore[assignment]
        self.config = config
        self.layers = layers
        self.stored = stored

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that config.json keeps."""
        return {"quant_method": checkpoint.METHOD, **self.stored}


class NogemmQuantizer(HfQuantizer):
    """Puts our layers into the model's skeleton before its weights are loaded, and writes our format."""

    packed = False
    kept: Mapping[str, torch.dtype] = MappingProxyType({})  # our tensors, and the dtype they get after the check

    @property
    def request(self) -> NogemmConfig:
        """The config, known to be ours."""
        assert isinstance(self.quantization_config, NogemmConfig)
        return self.quantization_config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            checkpoint.check_format(self.request.stored)
        elif self.request.config is None:
            raise ConfigError("NogemmConfig: give it a layer config, such as NogemmConfig(nogemm.LookupConfig())")

    def update_attn_implementation(self, config: Any) -> Any:
        for name in ("_attn_implementation", "_experts_implementation"):
            if getattr(config, name, None) == checkpoint.GUARD:
                setattr(config, name, None)
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            stored = self.request.stored
            checkpoint.check_files(stored, kwargs.get("checkpoint_files"))
            in_passing(lambda: _install_skeleton(model, stored))  # a process may load, and then fork
            self.kept = _dtypes(model)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Leave our tensors as they are stored until their checksums are compared; all others as transformers does."""
        if any(target in self.kept for target in getattr(converter, "target_patterns", ())):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            _check_loaded(model)
            in_passing(lambda: _check_and_cast(model, self.request.stored, self.kept))
            for name, layer in converted(model).items():
                stored = self.request.stored.get("fitted", {})
                layer.fitted = stored.get(checkpoint.base_name(model, name), "trained")
                if layer.fitted == "random":
                    mark_random(layer)
            connect(model)
            checkpoint.attach(model)
        else:
            assert self.request.config is not None  # validate_environment saw to it
            convert(model, self.request.config, self.request.layers, faster_at=None)  # nobody would read a report
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        if any(isinstance(layer, PackedFFN) for layer in installed(model).values()):
            raise PackedError(SAVE_PACKED)
        refuse_quantised(model, "save_pretrained")
        warn_if_random(model, "save_pretrained")
        checkpoint.attach(model)  # fresh descriptions for models inside this one, whose configs are stored along
        attach_quantizer(model)  # last: a model inside may share this one's config
        state = _state_to_save(model, sys._getframe(1))
        save_id = checkpoint.seal(model, model.config.quantization_config.stored, state)
        state.update(checkpoint.sentinels(model, state))
        return state, {checkpoint.SAVE_ID: save_id}

    def is_serializable(self) -> bool:
        if self.packed:  # transformers asks before it makes the directory
            raise PackedError(SAVE_PACKED)
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


# Called, not used as decorators: those forget the type of the class.
register_quantization_config(checkpoint.METHOD)(NogemmConfig)
register_quantizer(checkpoint.METHOD)(NogemmQuantizer)


def attach_quantizer(model: Any) -> None:
    """Give a converted PreTrainedModel our quantizer and an up-to-date description in its config."""
    config = NogemmConfig(**checkpoint.manifest(model))
    quantizer = NogemmQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    # transformers refuses .half(), .float() and training for models with this flag; ours allow all three.
    model.is_quantized = False
    model.config._is_quantized = False
    model.config.quantization_config = config
    model.config.attn_implementation = checkpoint.GUARD
    model.config.experts_implementation = checkpoint.GUARD


checkpoint.attached_by(attach_quantizer)


def _state_to_save(model: Any, caller: FrameType) -> dict[str, Tensor]:
    """Return what `save_pretrained(state_dict=...)` was given, an average of weights for example, else the weights.

    transformers does not hand a given state on to a quantizer, and takes the quantizer's in its place: so it is read
    where the caller has it.

    Raises:
        CheckpointError: the given tensors are not this model's; the message names them.
    """
    from transformers import PreTrainedModel

    own = model.state_dict()
    saving = caller.f_code is inspect.unwrap(PreTrainedModel.save_pretrained).__code__
    given = caller.f_locals["state_dict"] if saving else None
    if given is None:
        return own
    paths = {id(module): path for path, module in model.named_modules()}
    ours = [f"{paths[id(layer)]}.{key}" for layer in converted(model).values() for key in layer.state_dict()]
    wrong = {
        "unknown": [key for key in given if key not in own],
        "missing of converted FFNs": [key for key in ours if key not in given],
        "of another shape": [key for key in ours if key in given and given[key].shape != own[key].shape],
    }
    if any(wrong.values()):
        said = [f"{what}: {', '.join(names[:4])}{' ...' * (len(names) > 4)}" for what, names in wrong.items() if names]
        raise CheckpointError(f"save_pretrained: state_dict does not fit the {type(model).__name__}. {'; '.join(said)}")
    return dict(given)


def set_packed(model: nn.Module, packed: bool) -> None:
    """Tell every quantizer in the model whether saving must be refused."""
    for module in model.modules():
        quantizer = getattr(module, "hf_quantizer", None)
        if isinstance(quantizer, NogemmQuantizer):
            quantizer.packed = packed


def _install_skeleton(model: Any, stored: dict[str, Any]) -> None:
    checkpoint.recall(model, stored)
    open_sites = {checkpoint.base_name(model, site.name): site for site in survey(model, search=False).open}
    described, stored = stored, stored["sites"]
    missing = [name for name in stored if name not in open_sites]
    whole = type(model).__name__ in (model.config.architectures or ())
    if missing and (whole or len(missing) == len(stored)):
        raise CheckpointError(
            f"config.json names FFNs that {type(model).__name__} does not have: {', '.join(missing)}. It has: "
            f"{', '.join(open_sites) or 'none that nogemm lists'}.{_register_which(model, missing)}"
        )
    ignore: set[str] = set(model._keys_to_ignore_on_load_unexpected or ())
    for name, site in open_sites.items():
        if name not in stored:
            continue
        try:
            layer = site.empty_layer(layer_config(stored[name]))
        except ConfigError as error:
            raise CheckpointError(f"config.json, site {name!r}: {error}") from error
        site.install(layer)
        ignore.update(_sentinel_patterns(model, site, name, layer.site))  # type: ignore[arg-type]
    if "head" in described:
        ignore.update(_install_head(model, described["head"]))
    model._keys_to_ignore_on_load_unexpected = ignore


def _install_head(model: Any, stored: Any) -> list[str]:
    """Give the skeleton its converted head; a base model, which has none, leaves out what belongs to it."""
    dense = output_embeddings(model)
    if dense is None:
        return [r"(^|\.)moment$"]
    try:
        config = head_config(stored["config"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"config.json, head: {error}") from error
    if not isinstance(dense, nn.Linear) or not isinstance(config, HeadConfig):
        raise CheckpointError(
            f"config.json names a converted head, and that of {type(model).__name__} is none to convert"
        )
    assert isinstance(dense.weight, nn.Parameter)
    width, device = dense.in_features, dense.weight.device
    moment = torch.empty(width, width, device=device) if stored.get("moment") else None
    model.set_output_embeddings(HireHead(config, dense.weight, dense.bias, moment))
    return []


def _register_which(model: Any, missing: list[str]) -> str:
    """Say which classes to register, for a checkpoint that does not hold how their FFNs were taken out."""
    modules = {checkpoint.base_name(model, path): module for path, module in model.named_modules()}
    classes = sorted({type(modules[name]).__name__ for name in missing if name in modules})
    if not classes:
        return ""
    calls = ", ".join(f'nogemm.register_site("{name}", up=..., activation=..., down=..., put=...)' for name in classes)
    return f" Before loading, call {calls} as before saving, then save again: a checkpoint now stores it"


def _sentinel_patterns(model: Any, site: Site, name: str, record: Installed) -> list[str]:
    return [rf"(^|\.){re.escape(f'{name}.{vanished}')}$" for vanished in record.vanished]


def _check_loaded(model: Any) -> None:
    """Refuse a model in which any FFN weight did not come from the checkpoint.

    transformers only warns about missing tensors, and about wrong shapes if told to ignore them.
    """
    missing = []
    for name, layer in converted(model).items():
        missing += [f"{name}: {key}" for key, value in layer.state_dict(keep_vars=True).items() if not _loaded(value)]
    for site in survey(model, search=False).open:
        weights = [site.up.weight, site.down.weight]
        missing += [f"{site.name} (dense)" for weight in weights if not _loaded(weight)][:1]
    head = head_of(model)
    if head is not None and head.moment is not None and not _loaded(head.moment):
        missing.append("the head: moment")
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks weights of FFNs, or has them in another shape: {', '.join(missing[:6])}"
            + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
            + ". Was config.json edited, or did a save stop half-way?"
        )


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    paths = {id(module): path for path, module in model.named_modules()}
    return {
        f"{paths[id(layer)]}.{key}": value.dtype
        for layer in converted(model).values()
        for key, value in layer.state_dict().items()
    }


def _check_and_cast(model: Any, stored: dict[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
    """Compare checksums, then give parameters the dtype that the caller of from_pretrained asked for."""
    paths = {id(module): path for path, module in model.named_modules()}
    for name, layer in converted(model).items():
        checkpoint.check_tensors(stored, checkpoint.base_name(model, name), layer.state_dict())
        for key, parameter in layer.named_parameters():
            parameter.data = parameter.data.to(dtypes[f"{paths[id(layer)]}.{key}"])


def _loaded(value: Any) -> bool:
    # Offloaded weights stay on the meta device and are fetched when needed.
    return bool(getattr(value, "_is_hf_initialized", False)) or value.is_meta
