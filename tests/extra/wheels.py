"""Build the wheel twice, in two folders, and compare the bytes; then use it in clean environments.

    python tests/extra/wheels.py same                      two builds must be alike to the last bit
    python tests/extra/wheels.py oldest|newest [WHEEL]     install with the oldest or newest packages that the metadata
                                                           admits, and run a model through; torch comes from pip's own
                                                           settings, and may be gigabytes

Environments and builds lie in `build/wheels`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "wheels"
EPOCH = "1767225600"  # any fixed moment: zip files carry times
FOLDERS = ("a", "another-folder")
EXTRAS = ("hf", "cli")

# What a user does first; transformers and our format have to get along with one another.
SMOKE = """
import tempfile, torch, transformers, warnings
import nogemm
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
assert nogemm.ops.native_available()
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
ids = torch.arange(3, 15).view(1, -1)
for make, auto in (
    (lambda: BertModel(BertConfig(**sizes, num_hidden_layers=3)), AutoModel),
    (lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)), AutoModelForCausalLM),
):
    torch.manual_seed(0)
    model = make().eval()
    small = nogemm.LookupConfig(tables=4, bits=4, projection=nogemm.BHConfig(block=16))
    nogemm.convert(model, {"*.0*": small, "*.1*": nogemm.TreeConfig(depth=3), "*.2*": nogemm.HireConfig(keep=0.5)})
    with torch.no_grad():
        for layer in nogemm.converted(model).values():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        expected = model(ids)[0]
        with tempfile.TemporaryDirectory() as folder:
            nogemm.save(model, folder + "/m")
            loaded = auto.from_pretrained(folder + "/m").eval()
            assert torch.allclose(loaded(ids)[0], expected, atol=1e-5)
            for _ in range(2):
                twin = auto.from_pretrained(folder + "/m").eval()
                packed = nogemm.pack(twin, cache=folder + "/cache")
                assert torch.allclose(packed(ids)[0], expected, rtol=1e-3, atol=1e-4)
    if auto is AutoModelForCausalLM:
        nogemm.convert_head(model)
        assert nogemm.generate(model, ids, 4).shape[1] == ids.shape[1] + 4
print("works with torch", torch.__version__, "and transformers", transformers.__version__)
"""


def call(*words: object, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"wheels: {' '.join(map(str, words[:6]))} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done.stdout


def copy_sources(name: str) -> None:
    """Copy the tracked files, as they are now, into a folder of this name."""
    source = WORK / name / "source"
    shutil.rmtree(WORK / name, ignore_errors=True)
    for line in call("git", "-C", ROOT, "ls-files").splitlines():
        if (ROOT / line).is_file():
            (source / line).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / line, source / line)


def build(name: str) -> Path:
    """Build what was copied into a folder of this name; return the wheel."""
    source, out = WORK / name / "source", WORK / name / "out"
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps")
    call(*pip, "--no-build-isolation", "--wheel-dir", out, source, SOURCE_DATE_EPOCH=EPOCH)
    (wheel,) = out.glob("*.whl")
    return wheel


def differences(one: Path, other: Path) -> list[str]:
    """Name the members of two wheels that differ; "the archive itself" where only the archive does."""
    if one.read_bytes() == other.read_bytes():
        return []
    with zipfile.ZipFile(one) as left, zipfile.ZipFile(other) as right:
        names = sorted({*left.namelist(), *right.namelist()})
        both = {*left.namelist()} & {*right.namelist()}
        return [name for name in names if name not in both or left.read(name) != right.read(name)] or [
            "the archive itself"
        ]


def same() -> None:
    for name in FOLDERS:  # both, before minutes of building in which somebody may change a file
        copy_sources(name)
    first, second = map(build, FOLDERS)
    if different := differences(first, second):
        raise SystemExit(f"wheels: two builds differ in {', '.join(different)}")
    changed = WORK / "changed.whl"
    with zipfile.ZipFile(first) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name) + (b"\0" if name.endswith("_native.so") else b""))
    if not any(name.endswith("_native.so") for name in differences(first, changed)):
        raise SystemExit("wheels: the comparison does not see a changed library")
    print(f"wheels: {first.name} is the same to the last bit from two folders, {first.stat().st_size} bytes")


def requirements() -> list[str]:
    """Return what the wheel and the extras that are tried ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return sorted({*project["dependencies"], *(each for extra in EXTRAS for each in extras[extra])})


def environment(kind: str, wheel: Path) -> None:
    folder = WORK / kind
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    wanted = requirements()
    if kind == "oldest":
        wanted = [re.sub(r">=", "==", each) for each in wanted]
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    call(*pip, *(["--upgrade"] if kind == "newest" else []), *wanted)
    call(*pip, "--force-reinstall", "--no-deps", wheel)
    call(python, "-m", "pip", "check")
    clean = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "NOGEMM_CACHE": str(folder / "cache")}
    print(f"wheels: {kind}: {call(python, '-c', SMOKE, **clean).strip()}")
    call(folder / "bin" / "nogemm", "env", **clean)


def main(words: list[str]) -> None:
    if words == ["same"]:
        same()
    elif words[:1] in (["oldest"], ["newest"]) and len(words) <= 2:
        if len(words) == 1:
            copy_sources(FOLDERS[0])
        environment(words[0], Path(words[1]) if len(words) == 2 else build(FOLDERS[0]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
