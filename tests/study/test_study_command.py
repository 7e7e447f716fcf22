"""`nogemm study` and `nogemm report` on its folder: what they print, list and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_study import ROWS, TEXT, faked, outcome, write

from people import run

SEARCH = "search: {rates: [5e-3, 1e-2], extend: 1, options: {steps: 2}}\n"


def test_a_table_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faked(monkeypatch)
    facts = tmp_path / "facts.json"
    assert run("study", write(tmp_path), "-o", tmp_path / "out", "--json", facts) == 0
    out = capsys.readouterr().out
    assert "4 runs done, 0 failed, 0 left" in out
    assert "lookup" in out
    assert "95 % interval over seeds" in out
    assert json.loads(facts.read_text())["runs"] == {"done": 4, "failed": 0, "left": 0, "stopped": ""}
    page = tmp_path / "page.html"
    assert run("report", tmp_path / "out", "-o", page) == 0
    text = page.read_text()
    assert "validation loss against FLOP" in text
    assert "<polyline" in text
    assert run("report", facts, "-o", tmp_path / "same.html") == 0
    assert (tmp_path / "same.html").read_text() == text


def test_what_is_left_is_listed_with_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = faked(monkeypatch, lambda job: outcome(abs(job.options["lr"] - 0.005)))
    file, out = write(tmp_path, TEXT + ROWS + SEARCH), tmp_path / "out"
    assert run("study", file, "-o", out, "--list") == 0
    said = capsys.readouterr().out
    assert "not known before a run is done" in said
    assert fake.jobs == []
    assert not out.exists()
    assert run("study", file, "-o", out, "--only", "dense") == 0
    capsys.readouterr()
    facts = tmp_path / "list.json"
    assert run("study", file, "-o", out, "--list", "--json", facts) == 0
    dense, lookup = json.loads(facts.read_text())["rows"]
    assert (dense["done"], dense["left"], dense["seconds"]) == (2, 0, 0.0)
    assert (lookup["done"], lookup["left"], lookup["trials_left"]) == (0, 2, 2)
    # Made-up runs of 8 seconds for 256 tokens: two trials of 128 tokens and two final runs of 256.
    assert lookup["seconds"] == pytest.approx(8 * (2 * 128 + 2 * 256) / 256)


def test_rows_are_chosen_made_anew_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, file, out = faked(monkeypatch), write(tmp_path), tmp_path / "out"
    assert run("study", file, "-o", out, "--only", "lookup") == 0
    assert fake.names == ["lookup/seed-0", "lookup/seed-1"]
    assert "2 runs done, 0 failed, 2 left" in capsys.readouterr().out
    assert run("study", file, "-o", out, "--only", "lookup", "--redo", "lookup") == 0
    assert len(fake.jobs) == 4
    capsys.readouterr()
    write(tmp_path, (TEXT + ROWS).replace("tables: 4", "tables: 5"))
    assert run("study", file, "-o", out) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert "--redo lookup" in err[-1]
    assert "Traceback" not in err[-1]
    assert run("study", tmp_path / "gone.yaml") == 2
    assert "no such study file" in capsys.readouterr().err
    assert run("report", tmp_path / "out" / "lookup", "-o", tmp_path / "page.html") == 2
    assert "study.json is missing" in capsys.readouterr().err


def test_ctrl_c_ends_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(job: object) -> dict[str, object]:
        raise KeyboardInterrupt

    faked(monkeypatch, stop)
    assert run("study", write(tmp_path), "-o", tmp_path / "out") == 130
    assert "The same command goes on where it was" in capsys.readouterr().err
