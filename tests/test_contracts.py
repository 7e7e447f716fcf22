"""Rules about the whole house: who may import whom, what an import costs, which kernels run, what files may say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nogemm import ops
from nogemm.config import layer_kinds

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "nogemm"

# Each part may import itself, the leaves, and the parts before it in this order; one line is one rank.
ORDER = [
    {"errors", "version"},
    {"activations", "shape", "files"},
    {"config", "cost"},
    {"running"},
    {"ops"},
    {"hardware"},
    {"projections"},
    {"layers", "heads"},
    {"models"},
    {"convert"},
    {"distributed"},
    {"decoding"},
    {"export"},
    {"serve"},
    {"train", "bench"},
    {"study", "tune"},
    {"cli", "demo"},
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
# Written down because they are needed and because a new one must be noticed: configs name what they build in
# annotations, and measuring reads the data that training reads.
ALLOWED = {("config", "layers"), ("config", "projections"), ("bench", "train")}


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with some variables set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NOGEMM_")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | env, check=False)


def imports(path: Path) -> set[str]:
    """List the parts of nogemm that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "nogemm" else [f"nogemm.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("nogemm.")}
    return found & RANK.keys()


def upward(part: str, imported: set[str]) -> set[str]:
    """Return what `part` must not import."""
    return {other for other in imported if other != part and (part, other) not in ALLOWED and RANK[other] >= RANK[part]}


def parts() -> list[tuple[str, Path]]:
    """List (part, file) for every module under a ranked part."""
    files = [(path.relative_to(SOURCE).parts[0].removesuffix(".py"), path) for path in sorted(SOURCE.rglob("*.py"))]
    return [(part, path) for part, path in files if part in RANK]


def test_imports_point_one_way():
    bad = {str(path.relative_to(SOURCE)): upward(part, imports(path)) for part, path in parts()}
    assert {name: parts for name, parts in bad.items() if parts} == {}


def test_every_part_has_a_rank():
    found = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - RANK.keys() - {"__init__", "__main__", "__pycache__", "data", "testing"} == set()


def test_the_check_of_imports_can_fail(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "def f():\n    from nogemm.train.data import Batch\n    import nogemm.ops\n    from nogemm import cli"
    )
    assert imports(file) == {"train", "ops", "cli"}
    assert upward("layers", imports(file)) == {"train", "cli"}
    assert upward("demo", imports(file)) == {"cli"}


def module_of(path: Path) -> str:
    """Return a file's dotted name."""
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_imports(tree: ast.Module, known: set[str]) -> list[tuple[set[str], int, bool]]:
    """List (modules of nogemm or others' roots, line, inside a function) of every import that runs, types left out."""
    found: list[tuple[set[str], int, bool]] = []

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.append(({alias.name for alias in child.names}, child.lineno, inside))
            elif isinstance(child, ast.ImportFrom) and child.module:
                whole = {f"{child.module}.{alias.name}" for alias in child.names}
                found.append((whole & known or {child.module}, child.lineno, inside))
            walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    walk(tree, False)
    return found


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Return the groups of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for name in graph.get(todo.pop(), set()) - seen:
                seen.add(name)
                todo.append(name)
        return seen

    reach = {name: reached(name) for name in graph}
    return sorted({tuple(sorted(b for b in reach[a] if a in reach.get(b, set()))) for a in graph if a in reach[a]})


# Entry points set their process up, or say what is wrong, before seconds of imports.
LATE = ("nogemm.cli", "nogemm.demo.__main__", "nogemm.demo.child")


@pytest.fixture(scope="module")
def all_imports() -> dict[str, list[tuple[set[str], int, bool]]]:
    files = {module_of(path): path for path in sorted((ROOT / "src").rglob("*.py"))}
    return {name: run_imports(ast.parse(path.read_text(encoding="utf-8")), set(files)) for name, path in files.items()}


def test_no_import_circle(all_imports):
    graph = {name: {t for targets, _, _ in found for t in targets if t in all_imports and t != name}
             for name, found in all_imports.items()}  # fmt: skip
    assert circles(graph) == []


def test_own_modules_are_imported_at_the_top(all_imports):
    """Inside functions stand only packages that may be absent, and modules of ours that need one of them."""
    tops = {name: {t for targets, _, inside in found if not inside for t in targets}
            for name, found in all_imports.items()}  # fmt: skip
    needing = {name for name, targets in tops.items() if any(t.split(".")[0] == "transformers" for t in targets)}
    late = [
        (name, line)
        for name, found in all_imports.items()
        for targets, line, inside in found
        if inside and not name.startswith(LATE) and (targets & all_imports.keys()) - needing
    ]
    assert late == []


def test_the_checks_of_circles_can_fail():
    code = "from a.b import c\nif TYPE_CHECKING:\n    import d\ndef f():\n    import e"
    assert run_imports(ast.parse(code), {"a.b.c"}) == [({"a.b.c"}, 1, False), ({"e"}, 5, True)]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [("b", "c")]


def test_figures_of_papers_are_in_no_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    assert settings["wheel"]["packages"] == ["src/nogemm"]
    (checkout,) = settings["overrides"]
    assert checkout["if"] == {"state": "editable"}
    assert checkout["wheel"]["packages"] == ["src/nogemm", "src/nogemm_papers"]


def test_only_commands_know_the_figures_of_papers_and_only_when_called(all_imports):
    using = {(name, inside) for name, found in all_imports.items() for targets, _, inside in found
             if name.startswith("nogemm.") and any(t.startswith("nogemm_papers") for t in targets)}  # fmt: skip
    assert using == {("nogemm.cli.bench", True), ("nogemm.cli.profile", True)}


@pytest.mark.parametrize("kind", layer_kinds())
def test_a_method_has_a_room_tests_and_a_page_of_its_name(kind):
    name = kind.replace("-", "_")
    room = SOURCE / "layers" / name
    assert all((room / f"{part}.py").is_file() for part in ("config", "layer"))  # a packed twin may be a base's
    assert (ROOT / "tests" / "layers" / f"test_{name}.py").is_file()
    assert (ROOT / "docs" / "reference" / "methods" / f"{name}.md").is_file()


def test_kernels_know_no_torch():
    files = [*ROOT.glob("csrc/kernels/*"), *ROOT.glob("csrc/isa/*")]
    assert files
    knowing = [path.name for path in files if re.search(r"#include.*torch", path.read_text(encoding="utf-8"))]
    assert knowing == []


INSTRUCTION_SETS = re.compile(
    r"#\s*(?:if|elif).*(?:__AVX|__ARM|__aarch64__|__x86_64__|NOGEMM_FORCE_SCALAR)|_mm\d*_|\bv[a-z]+q_\w+\("
)


def test_kernels_know_no_instruction_set():
    files = [path for path in ROOT.glob("csrc/kernels/*.h") if not path.name.startswith("vec")]
    assert files
    knowing = [path.name for path in files if INSTRUCTION_SETS.search(path.read_text(encoding="utf-8"))]
    assert knowing == []


@pytest.mark.parametrize(
    "line", ["#if defined(__AVX512VNNI__)", "# elif defined(__ARM_NEON)", "y = _mm256_add_ps(a, b);"]
)
def test_the_check_of_instruction_sets_can_fail(line):
    assert INSTRUCTION_SETS.search(line)


def test_import_is_silent_and_lean():
    heavy = ["datasets", "matplotlib", "rich", "sentence_transformers", "transformers", "typer"]
    done = run_python(f"import sys, nogemm; print([name for name in {heavy} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_registration_with_transformers_imports_nothing_more():
    code = (
        "import sys, torch, transformers.quantizers.auto\n"
        "import nogemm.errors, nogemm.ops, nogemm.layers\n"
        "before = set(sys.modules)\n"
        "import nogemm.convert.quantizer\n"
        "print([name for name in sorted(set(sys.modules) - before) if not name.startswith('nogemm')])"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_the_native_extension_is_there():
    assert ops.native_available()


@pytest.mark.parametrize("isa", ops.supported_isas())
def test_a_forced_isa_takes_effect(isa):
    done = run_python("import nogemm.ops as ops; print(ops.isa())", NOGEMM_ISA=isa)
    assert done.stdout == isa + "\n", done.stderr


def test_an_unknown_isa_is_refused():
    done = run_python("import nogemm.ops", NOGEMM_ISA="avx1024")
    assert done.returncode != 0
    assert "avx1024" in done.stderr.strip().splitlines()[-1]


def test_native_can_be_switched_off():
    done = run_python("import nogemm.ops as ops; print(ops.native_available(), ops.isa())", NOGEMM_DISABLE_NATIVE="1")
    assert done.stdout == "False reference\n", done.stderr


def tracked_texts() -> list[tuple[str, str]]:
    """Return (name, content) of every text file under version control; of every file where there is no git."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    texts = []
    for name in listed:
        path = ROOT / name
        if name and path.is_file() and path.suffix not in (".bin", ".gz", ".png", ".safetensors"):
            texts.append((name, path.read_text(encoding="utf-8", errors="replace")))  # inputs of fuzzers are any bytes
    return texts


# Spelt in pieces, so that this file does not find itself.
FORBIDDEN = re.compile("|".join(["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/[a-z]", "/us" + "ers/[a-z]"]), re.IGNORECASE)


def test_no_file_names_a_path_of_somebodys_machine():
    texts = tracked_texts()
    assert len(texts) > 50
    found = {name: FORBIDDEN.findall(text) for name, text in texts}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_the_check_of_paths_can_fail():
    assert FORBIDDEN.search("see /ho" + "me/ann/model")
    assert not FORBIDDEN.search("https://example.org/models")


def test_files_and_functions_stay_short():
    long_files = {}
    long_functions = {}
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long_files[path.name] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 80:
                long_functions[f"{path.name}:{node.name}"] = (node.end_lineno or 0) - node.lineno
    assert long_files == {}
    assert long_functions == {}
