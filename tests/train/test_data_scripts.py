"""The scripts in data/: they rebuild what is kept there, and the packaged sample is a part of it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nogemm.train import load_split

DATA = Path(__file__).parents[2] / "data"

PACKAGES = """Package: alpha
Section: utils
Description: first

Package: beta
Section: net
Description: second
"""
LONG = (
    " Version 1 of this tool does a number of useful things that are worth describing here,\n"
    " and continues for a while on a second line."
)
TRANSLATION = f"""Package: alpha
Description-md5: 0
Description-en: the first tool
{LONG}
 .
 A second paragraph:
  * with an item

Package: beta
Description-en: the second tool
{LONG.replace("1", "2")}

Package: gamma
Description-en: too short
 Nothing much.

Package: omega
Description-en: only in another architecture
 A long enough description of something that the package index of this architecture does not list.
"""
WORDNET = """  1 licence text
00001740 03 n 02 tower_clock 0 clock_tower 1 000 | a clock in a tower; "it strikes"
00002000 03 n 01 other 0 000 | something else
"""


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DATA))
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_debian_rows_follow_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild = load("rebuild", monkeypatch)
    packages, translation = tmp_path / "Packages", tmp_path / "Translation-en.gz"
    packages.write_text(PACKAGES)
    translation.write_bytes(gzip.compress(TRANSLATION.encode()))
    rows = rebuild.debian_rows(str(packages), str(translation), None)
    assert [(row["name"], row["section"]) for row in rows] == [("alpha", "utils"), ("omega", None)]
    assert rows[0]["short"] == "the first tool"
    assert rows[0]["long"].endswith("continues for a while on a second line.\n\nA second paragraph:  * with an item")
    assert [row["name"] for row in rebuild.debian_rows(str(packages), str(translation), {"omega"})] == ["omega"]


def test_wordnet_rows_and_a_wrong_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild = load("rebuild", monkeypatch)
    (tmp_path / "data.noun").write_text(WORDNET)
    for name in ("data.verb", "data.adj", "data.adv"):
        (tmp_path / name).write_text("")
    (row,) = rebuild.wordnet_rows(tmp_path, ["n00001740"])
    assert row == {"id": "n00001740", "words": ["tower clock", "clock tower"], "gloss": "a clock in a tower"}
    with pytest.raises(SystemExit, match=r"not WordNet 3\.0: 1 synsets"):
        rebuild.wordnet_rows(tmp_path, ["n00001740", "n99999999"])


def test_equal_rows_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild = load("rebuild", monkeypatch)
    rows = [{"name": "a", "long": "text"}]
    for name in ("one.gz", "two.gz"):
        rebuild.write_rows(rows, tmp_path / name)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    assert rebuild.report_difference(rows, tmp_path / "one.gz", "name") == 0
    assert rebuild.report_difference([{"name": "a", "long": "other"}], tmp_path / "one.gz", "name") == 1


def test_the_packaged_sample_is_part_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    make_sample = load("make_sample", monkeypatch)
    with gzip.open(DATA / "debian-packages.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 36_134
    whole = {row["long"]: make_sample.split_of(row["long"]) for row in rows}
    assert [list(whole.values()).count(split) for split in make_sample.SPLITS] == [1829, 1776, 32529]
    packaged = {split: load_split("sample", split) for split in make_sample.SPLITS}
    assert set(packaged["test"].documents) == {text for text, split in whole.items() if split == "test"}
    expected = {
        make_sample.cut(text, make_sample.LONGEST_TRAINING_TEXT) for text, split in whole.items() if split == "train"
    }
    assert set(packaged["train"].documents) <= expected
    assert all(whole[text] == "validation" for text in packaged["validation"].documents)
    assert load_split(DATA / "debian-packages.jsonl.gz", "test").documents == packaged["test"].documents


def test_the_sample_fits_the_package() -> None:
    path = Path(__file__).parents[2] / "src/nogemm/data/sample.jsonl.gz"
    assert path.stat().st_size <= 2_000_000
