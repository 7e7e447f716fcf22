"""`./run bench` runs the commands that benchmarks/README.md shows, and every recorded result has one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark_scripts import load

ROOT = Path(__file__).resolve().parents[2]
record = load("record")


def test_every_recorded_file_has_its_command() -> None:
    commands = {file.name for one in record.recordings(record.PAGE.read_text()) for file in one.files}
    recorded = {path.name for path in (ROOT / "benchmarks" / "results").glob("*/*.json*")}
    assert recorded - commands == {"demo.json"}, "demo.json is ./run demo's"


def test_every_recorded_file_lies_under_its_processor() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        result = json.loads(path.read_text())
        machine, held = result.get("machine"), result.get("held_to")
        if machine is not None:
            ending = f"-{machine['family']}-{machine['model']}" + (f"-{held}" if held else "")
            assert path.parent.name.endswith(ending), path


def test_blocks_are_read_command_by_command() -> None:
    page = "text\n```bash\none \\\n  --json $RESULTS/a.json\n\nset -e\ntwo > $RESULTS/b/c.json\n```\n"
    page += "```bash\nnogemm env\n```\n"
    first, second = record.recordings(page)
    assert first.shell == "one \\\n  --json $RESULTS/a.json"
    assert second.files == (record.RESULTS / "b/c.json",)
    assert second.named("c")
    assert not second.named("b")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two recordings, of which one fails; one file is there already."""
    page = tmp_path / "README.md"
    page.write_text(
        '```bash\necho \'{"date": "2026-01-02"}\' > $RESULTS/good.json\n\n'
        "false > $RESULTS/bad.json\ntouch too-far\n```\n"
    )
    results = tmp_path / record.RESULTS
    results.mkdir(parents=True)
    (results / "good.json").write_text('{"date": "2026-01-01"}')
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "PAGE", page)
    return tmp_path


def test_a_failure_is_told_and_does_not_stop_the_rest(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main([]) == 1
    assert "failed: bad.json" in capsys.readouterr().out
    assert "2026-01-02" in (small / record.RESULTS / "good.json").read_text()
    assert not (small / "too-far").exists(), "went on within a block"


def test_what_is_there_or_new_is_left_out(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*words: str) -> str:
        assert record.main([*words, "--list"]) == 0
        return capsys.readouterr().out

    assert "good.json" not in listed("--missing")
    assert "bad.json" in listed("--missing")
    assert "good.json" not in listed("--since", "2026-01-01")
    assert "good.json" in listed("--since", "2026-01-02")
    assert "bad.json" not in listed("--only", "good")
    with pytest.raises(SystemExit):
        record.main(["--only", "nothing"])
    assert "no command writes 'nothing'" in capsys.readouterr().err
