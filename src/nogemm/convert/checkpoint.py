"""The checkpoint format, and its lazy registration with transformers.

A converted model is an ordinary transformers checkpoint with three additions. `config.json` holds, under
`quantization_config`, {site: layer config}, a format version, a checksum per tensor of ours and an id of this save,
and how sites of classes that nogemm does not list were taken out.
The weight files hold the same id, and empty tensors (sentinels) under the names of the dense weights that are gone.
And `config.json` asks for attention and expert implementations that do not exist: transformers alone stops at them
with a message that says to import nogemm, where it would otherwise only warn and give random FFNs. The whole contract
is in docs/guides/checkpoints.md.

Importing transformers costs seconds, so everything that needs it lives in `quantizer.py`, which
the import hook below loads as soon as transformers' own quantizers are imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert._families import SiteAdapter, is_listed
from nogemm.convert._reading import is_module
from nogemm.convert.fitted import fitted_state
from nogemm.convert.sites import Installed, converted, installed, remember, survey
from nogemm.errors import CheckpointError
from nogemm.files import parse_json
from nogemm.heads import head_of
from nogemm.layers import FFN

FORMAT = 1
METHOD = "nogemm"
SAVE_ID = "nogemm_save_id"
GUARD = "none: this checkpoint needs `import nogemm` before it is loaded"
_TRIGGER = "transformers.quantizers.auto"
_ATTACHING: list[Callable[[Any], None]] = []


def manifest(model: nn.Module) -> dict[str, Any]:
    """Describe the converted sites of a transformers model, as `config.json` stores it.

    Site names are relative to the base model (`encoder.layer.0`, not `bert.encoder.layer.0`), so that a checkpoint of
    a task model loads into the base model and back.
    """
    layers = converted(model)
    described = {
        "format": FORMAT,
        "sites": {base_name(model, name): layer.config.to_dict() for name, layer in layers.items()},
        "fitted": {base_name(model, name): fitted_state(layer) for name, layer in layers.items()},
    }
    head = head_of(model)
    if head is not None:
        described["head"] = {"config": head.config.to_dict(), "moment": head.moment is not None}
    holders = _adapters(model, layers)
    return {**described, "holders": holders} if holders else described


def _adapters(model: nn.Module, layers: Mapping[str, FFN]) -> dict[str, dict[str, Any]]:
    """Return {site: its holder's class and adapter} of all sites, converted or dense, whose class is not listed."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        record = layer.site  # type: ignore[union-attr]
        assert isinstance(record, Installed)
        if record.adapter is not None and not is_listed(record.holder, record.adapter):
            found[base_name(model, name)] = {"class": record.holder, **record.adapter.to_dict()}
    for site in survey(model, search=False).open:
        holder = type(site.owner).__name__
        if not is_listed(holder, site.adapter):
            found[base_name(model, site.name)] = {"class": holder, **site.adapter.to_dict()}
    return found


def recall(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Note on a model's modules how the checkpoint took FFNs of unlisted classes out: nothing is searched or proven.

    Raises:
        CheckpointError: an entry cannot be read, or names matrices that the model's module does not have.
    """
    modules = dict(model.named_modules())
    holders = stored.get("holders", {})
    if not isinstance(holders, dict):
        raise CheckpointError(f"config.json: holders must name sites, got {holders!r}")
    for name, entry in holders.items():
        data = dict(entry) if isinstance(entry, dict) else {}
        holder = data.pop("class", "?")
        adapter = SiteAdapter.from_dict(data, name)
        owner = modules.get(f"{getattr(model, 'base_model_prefix', '')}.{name}", modules.get(name))
        if owner is None:
            continue  # a model that is a part of the saved one
        lacking = [path for path in adapter.matrices if not is_module(owner, path)]
        if lacking:
            raise CheckpointError(
                f"config.json says that {name!r} is a {holder} with its FFN in {', '.join(adapter.matrices)}, but the "
                f"{type(owner).__name__} of this model has no {', '.join(lacking)}: was it saved with other model code?"
            )
        remember(owner, adapter)


def seal(model: nn.Module, stored: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Add checksums of our tensors and a fresh save id to `stored`; return the id."""
    stored["save_id"] = uuid.uuid4().hex
    paths = {id(module): path for path, module in model.named_modules()}
    stored["checksums"] = {}
    for name, layer in converted(model).items():
        path = paths[id(layer)]
        stored["checksums"][base_name(model, name)] = {
            key: checksum(state[f"{path}.{key}"]) for key in layer.state_dict()
        }
    return stored["save_id"]


def sentinels(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an empty tensor for every dense weight that conversion removed."""
    empty: dict[str, Tensor] = {}
    for name, layer in converted(model).items():
        for vanished in layer.site.vanished:  # type: ignore[union-attr]
            key = f"{name}.{vanished}"
            if key not in state:
                empty[key] = torch.zeros(0)
    return empty


def base_name(model: nn.Module, name: str) -> str:
    """Return a site's name relative to the base model."""
    prefix = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix else name


def checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, dtype and shape."""
    data = memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    label = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return f"{zlib.crc32(data, zlib.crc32(label)):08x}"


def check_format(stored: dict[str, Any]) -> None:
    """Raise CheckpointError unless this version can read the stored description."""
    version = stored.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {version}, this nogemm reads up to {FORMAT}: upgrade nogemm to load it"
        )
    sites, head = stored.get("sites"), stored.get("head")
    if version != FORMAT or not isinstance(sites, dict) or not (sites or isinstance(head, dict)):
        raise CheckpointError(
            "config.json: quantization_config is not a complete nogemm description (format and sites); restore it "
            "from the save, or save the model again"
        )
    for name, kind in {"sites": dict, "fitted": str, "checksums": dict}.items():
        entries = stored.get(name, {})
        if not isinstance(entries, dict) or not all(isinstance(entry, kind) for entry in entries.values()):
            raise CheckpointError(f"config.json: {name} in quantization_config is damaged: restore it from the save")
    if not isinstance(stored.get("head", {}), dict):
        raise CheckpointError("config.json: head in quantization_config is damaged: restore it from the save")


def check_files(stored: dict[str, Any], files: Sequence[str | Path] | None) -> None:
    """Check that the weight files and the config come from one save that was completed.

    Raises:
        CheckpointError: a file is truncated, or belongs to another save.
    """
    if files is None or "save_id" not in stored:
        return  # loaded from a state dict, or the user removed the seal on purpose
    for file in map(Path, files):
        if _metadata(file).get(SAVE_ID) != stored["save_id"]:
            raise CheckpointError(
                f"{file.name} and config.json come from different saves (an interrupted save_pretrained, or files "
                "mixed by hand); save again, with nogemm.save, which cannot be interrupted half-way"
            )


def check_tensors(stored: dict[str, Any], site: str, tensors: Mapping[str, Tensor]) -> None:
    """Check the tensors of one loaded site against their checksums.

    Raises:
        CheckpointError: a tensor differs from what was saved; the message names it.
    """
    if "save_id" not in stored:
        return
    expected: dict[str, str] = stored.get("checksums", {}).get(site, {})
    for key, value in tensors.items():
        if not value.is_meta and checksum(value) != expected.get(key):
            raise CheckpointError(
                f"the weights of {site!r} ({key}) differ from what was saved; the checkpoint is corrupted or was "
                "edited. If on purpose, remove save_id from quantization_config in config.json"
            )


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file.name}: converted models are stored as safetensors only")
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.name} is missing, did a save stop half-way?") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} is truncated or corrupted: {error}") from error


def attach(model: nn.Module) -> None:
    """Make `save_pretrained` of a converted transformers model, and of the models inside it, write our format."""
    if not _ATTACHING or "transformers.modeling_utils" not in sys.modules:
        return
    for module in model.modules():
        ours = isinstance(module, sys.modules["transformers.modeling_utils"].PreTrainedModel)
        if ours and (converted(module) or head_of(module) is not None):
            _ATTACHING[0](module)


def detach(model: nn.Module) -> None:
    """Let models in which nothing of ours is left write their own format again; the others ours, as it is now."""
    attach(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        stored = getattr(config, "quantization_config", None)
        ours = bool(installed(module)) or head_of(module) is not None
        packed = getattr(getattr(module, "hf_quantizer", None), "packed", False)  # it refuses to be saved
        if getattr(stored, "quant_method", None) != METHOD or ours or packed:
            continue
        module.hf_quantizer = None  # type: ignore[assignment]
        del config.quantization_config
        for name in ("attn_implementation", "experts_implementation"):
            if getattr(config, name, None) == GUARD:
                delattr(config, name)


def attached_by(attach_to: Callable[[Any], None]) -> None:
    """Name what attaches our format to one PreTrainedModel: `quantizer.py` does, once transformers is loaded."""
    _ATTACHING[:] = [attach_to]


def is_checkpoint(path: str | Path) -> bool:
    """Tell whether `path` is a directory that holds a converted model."""
    try:
        config = parse_json((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and (config.get("quantization_config") or {}).get("quant_method") == METHOD


class _RegisterAfter(importlib.abc.Loader):
    """Run the real loader of transformers' quantizer registry, then register ours."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("nogemm.convert.quantizer")

    def __getattr__(self, name: str) -> Any:  # get_source, get_code and others that tools ask a loader for
        return getattr(self.loader, name)


class _Hook(importlib.abc.MetaPathFinder):
    """Notice the import of transformers' quantizer registry; every other import passes by."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register the format now if transformers' quantizers are loaded, else when they will be. Costs microseconds."""
    if _TRIGGER in sys.modules:
        importlib.import_module("nogemm.convert.quantizer")
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
