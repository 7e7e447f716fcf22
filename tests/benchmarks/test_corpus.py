"""The corpus of Debian's documentation: from packages that the test builds, the same bytes again, with its notice."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmark_scripts import load
from nogemm.train.sources import texts

corpus = load("corpus")
LONG = "The kernel keeps a list of all the pages that it has given to a process, and it takes them back in the order"
OTHER = "A table of numbers is read from the disk when the first of them is wanted, and it stays in memory after that"
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb, which builds packages, is missing")


def package(folder: Path, name: str, files: dict[str, str]) -> None:
    """Build a .deb of documents."""
    root = folder / f"{name}-root"
    for path, text in files.items():
        file = root / "usr/share/doc" / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text.encode()) if path.endswith(".gz") else text.encode())
    (root / "DEBIAN").mkdir()
    control = f"Package: {name}\nVersion: 1.2\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: x\n"
    (root / "DEBIAN" / "control").write_text(control + "Homepage: https://example.org\n")
    command = ["dpkg-deb", "--root-owner-group", "-b", str(root), str(folder / f"{name}.deb")]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(root)


@needs_dpkg
def test_a_corpus_is_made_of_packages(tmp_path: Path) -> None:
    debs = tmp_path / "debs"
    debs.mkdir()
    page = f"<html><head><title>{LONG}</title></head><body><p>{LONG}, <b>3 &amp; 4</b>.</p><pre>{OTHER}</pre>"
    package(debs, "b-doc", {"html/page.html": f"{page}<p>short</p><li>{OTHER}.</li></body>", "copyright": "Free."})
    package(debs, "a-doc", {"notes.txt.gz": f"{LONG}, 5 & 6.\n\n    {OTHER} code\n\nint x = 3;\n", "data.json": LONG})
    assert corpus.main([str(tmp_path / "one"), "--debs", str(debs)]) == 0
    assert corpus.main([str(tmp_path / "two"), "--debs", str(debs)]) == 0
    made = tmp_path / "one" / "corpus.jsonl.gz"
    assert made.read_bytes() == (tmp_path / "two" / "corpus.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(made.read_bytes()).decode().splitlines()]
    # The paragraph of b-doc stood in a-doc already, but for its numbers.
    assert [(row["source"], row["text"]) for row in rows] == [("a-doc", f"{LONG}, 5 & 6."), ("b-doc", f"{OTHER}.")]
    assert {row["split"] for row in rows} <= {"train", "validation", "test"}
    notice = (tmp_path / "one" / "NOTICE").read_text()
    assert "b-doc 1.2" in notice
    assert "https://example.org" in notice
    assert "Free." in notice
    kept = [row["text"] for row in rows if row["split"] == "train"]
    assert kept == [] or list(texts(made)) == kept


@needs_dpkg
def test_a_damaged_package_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.deb").write_bytes(b"no package")
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        corpus.make([tmp_path / "bad.deb"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        corpus.main([str(tmp_path / "out"), "--debs", str(tmp_path)])
    assert "no .deb file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (LONG, True),
        (LONG[:79], False),
        ("int a = b + c; return f(x, y, z); while (i < 10) { i++; } if (p != NULL) free(p); // the end", False),
        ("Der Kern behält eine Liste aller Seiten, die er einem Prozess gegeben hat, und nimmt sie so zurück", False),
        ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau", False),
    ],
)  # fmt: skip
def test_running_text_is_told_from_the_rest(line: str, kept: bool) -> None:
    assert corpus.is_running_text(line) == kept


def test_documents_are_split_by_their_names() -> None:
    splits = [corpus.split_of(f"doc/{i}") for i in range(4000)]
    assert splits == [corpus.split_of(f"doc/{i}") for i in range(4000)]
    assert 40 < splits.count("validation") < 130
    assert 40 < splits.count("test") < 130
