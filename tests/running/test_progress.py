"""Progress of commands: plain lines where no terminal is, and what a command that was stopped leaves."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nogemm import cli
from nogemm.running.measured import measured
from nogemm.running.progress import Progress, training_lines


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def wait_for(stream: io.StringIO, text: str) -> None:
    """Wait until a watching thread has written something; the limit only ends a broken test."""
    end = time.monotonic() + 20
    while text not in stream.getvalue() and time.monotonic() < end:
        time.sleep(0.01)
    assert text in stream.getvalue()


def test_plain_lines_are_not_printed_too_often():
    out = io.StringIO()
    show = Progress(out, every=3600)
    show("one")
    show("two")
    assert out.getvalue() == ""  # a command that ends at once is silent
    often = Progress(out, every=0)
    often("one")
    often("two")
    assert out.getvalue() == "one\ntwo\n"


def test_a_step_that_takes_long_repeats_its_line():
    out = io.StringIO()
    with Progress(out, every=0.02, silence=0.05).watching() as show:
        show("compiling")
        wait_for(out, "compiling (0 s so far)\n")
    lines = out.getvalue().splitlines()
    assert lines[0] == "compiling"


def test_the_last_of_many_lines_is_shown_in_the_end():
    out = io.StringIO()
    with Progress(out, every=0.05).watching() as show:
        for number in range(100):
            show(f"line {number}")
        wait_for(out, "line 99\n")
    assert len(out.getvalue().splitlines()) < 100


def test_a_terminal_shows_one_line_in_place():
    out = Terminal()
    show = Progress(out)
    show("one")
    show("two")
    show.clear()
    assert out.getvalue() == "\r\033[Kone\r\033[Ktwo\r\033[K"


def test_training_logs_where_no_terminal_is():
    out = io.StringIO()
    logger = logging.getLogger("nogemm.train")
    with training_lines(Progress(out, every=0)):
        logger.info("layers: 3%%")
    logger.info("nobody hears this")
    assert out.getvalue() == "training: reading texts\nlayers: 3%%\n"
    with training_lines(Progress(terminal := Terminal())):
        logger.info("the bar says it")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_bench_prints_and_writes_its_rows(number, code, tmp_path, capsys, monkeypatch):
    def stopped(args: Any, *, note: Any, keep: Any) -> dict[str, Any]:
        row = {"contender": "nogemm-int8", "batch": 1, "length": 16, "us_p10": 1e3, "us_p90": 1e3}
        keep({"machine_line": "a machine", "rows": [row | {"us_median": 1e3, "ratio": 1.0, "rounds": 2}]})
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    monkeypatch.setattr("nogemm.bench.model.run_model_bench", stopped)
    file = tmp_path / "m.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "model", "--json", str(file)])
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert "nogemm-int8, 2 rounds only" in out
    assert "partial: stopped by" in out
    assert str(file) in err
    found = json.loads(file.read_text())
    assert (found["kind"], found["partial"]) == ("model", True)
    assert found["rows"][0]["us_median"] == 1e3


def test_nothing_measured_leaves_no_file(tmp_path: Path):
    def work(note: Any, keep: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        measured("lsh", tmp_path / "x.json", work, lambda result: pytest.fail("there is nothing to show"))
    assert not (tmp_path / "x.json").exists()
