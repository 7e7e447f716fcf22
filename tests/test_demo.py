"""The demo's budget, its steps, and what it says about a machine that is slow or busy."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nogemm.demo.chain import recorded_searches, run_watched
from nogemm.demo.child import LEAST_PAIRS, pairs_within
from nogemm.demo.plan import LEAST_TRAINING, MOST_TRAINING, PEERS, SIZES, TOTAL_SECONDS, expected_agreement, plan
from nogemm.demo.steps import Steps
from nogemm.demo.table import print_result
from nogemm.errors import ConfigError, NogemmError
from nogemm.hardware import load
from nogemm.hardware.load import Load
from nogemm.running import progress as progress_module


def teacher(rate: float) -> dict[str, Any]:
    """Return what the first step would find on a machine that embeds `rate` texts a second."""
    texts = min(3658, int(35 * rate))
    found = {"texts_per_second": rate, "texts": texts, "all_texts": 3658}
    return found | {"embed_seconds": texts / rate, "load_seconds": 900 / rate}


def test_a_machine_of_the_recorded_speed_does_everything():
    found = plan(teacher(180.0), spent=30.0)
    assert found["training_seconds"] == MOST_TRAINING
    assert (found["peers"], found["sizes"]) == (list(PEERS), [list(size) for size in SIZES])
    assert found["notes"] == []
    assert "1,000,000 training tokens, agreement about 0.93" in found["said"]


@pytest.mark.parametrize("slowness", [1.0, 2.0, 3.0])
def test_a_slower_machine_ends_in_time(slowness):
    first = teacher(180.0 / slowness)
    spent = first["embed_seconds"] + first["load_seconds"] + 5 * slowness
    found = plan(first, spent)
    again = 2 * (first["embed_seconds"] + first["load_seconds"])
    # The engines need 120 s on the recorded machine; the limit of the step holds where fewer of them do not help.
    engines = 120 * slowness * len(found["peers"]) / len(PEERS)
    timing = min(found["timing_seconds"], engines)
    assert spent + again + found["training_seconds"] + timing <= TOTAL_SECONDS * 1.1
    assert found["training_seconds"] >= LEAST_TRAINING


def test_a_slow_machine_is_told_what_to_expect():
    found = plan(teacher(60.0), spent=75.0)
    assert len(found["peers"]) < len(PEERS)
    assert max(found["sizes"]) < list(SIZES[-1])
    (note,) = found["notes"]
    assert "1/3.0 of the recorded one's speed" in note
    assert "1,027,699 tokens and an agreement of 0.93" in note
    assert "agreement" in found["said"]


@pytest.mark.parametrize(
    ("tokens", "said"), [(1e5, "below 0.90"), (298_463, "0.90"), (1_027_699, "0.93"), (9e6, "0.93")]
)
def test_agreement_is_guessed_from_runs_that_were_made(tokens, said):
    assert expected_agreement(tokens).endswith(said)


def test_texts_are_as_many_as_the_time_allows():
    words = ["w"] * 1000
    assert pairs_within(1e9, lambda texts: None, words, words) == 1000
    assert pairs_within(0.0, lambda texts: None, words, words) == LEAST_PAIRS
    assert pairs_within(0.0, lambda texts: None, words[:9], words[:9]) == 9


def test_steps_are_done_once_and_show_progress(tmp_path, monkeypatch, capsys):
    out = io.StringIO()
    monkeypatch.setattr(progress_module.progress, "_stream", out)
    monkeypatch.setattr(progress_module.progress, "every", 0.0)
    steps = Steps(tmp_path / "steps", {"a": 1})
    assert steps.run("one", "do a thing", lambda: {"said": "did it"}) == {"said": "did it"}
    assert out.getvalue() == "do a thing\n"
    again = Steps(tmp_path / "steps", {"a": 1})
    again.run("one", "do a thing", lambda: pytest.fail("done twice"))
    assert again.spent() == steps.spent()
    assert "did it (earlier" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--restart"):
        Steps(tmp_path / "steps", {"a": 2})


def test_lines_of_a_process_are_progress_and_its_last_words_an_error(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress_module.progress, "_stream", out)
    monkeypatch.setattr(progress_module.progress, "every", 0.0)
    run_watched([sys.executable, "-c", "print('8 of 9 texts')"], "model")
    assert out.getvalue() == "model: 8 of 9 texts\n"
    with pytest.raises(NogemmError, match="model failed: no such thing"):
        run_watched([sys.executable, "-c", "import sys; sys.exit('no such thing')"], "model")


def test_a_busy_machine_names_who_is_in_the_way():
    quiet = Load(cores=2, got=1.0, others=0.05, busiest="", average=0.3)
    assert not quiet.busy
    busy = Load(cores=2, got=0.6, others=1.0, busiest="python3 (process 12, nice 19)", average=1.9)
    assert busy.busy
    assert str(busy) == (
        "other processes use 1.0 of 2 cores, most of it python3 (process 12, nice 19); "
        "a product on all threads got 60 % of its processor time; load average 1.9"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="who else runs is read from /proc")
def test_another_process_that_works_is_seen():
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while load._process_seconds().get(str(worker.pid), 0.0) < 0.5:
            pass
        alone = {str(worker.pid): 0.0}
        assert f"(process {worker.pid}, nice {os.nice(0)})" in load._busiest(alone)
        found = load.look(0.05)
        assert 0.0 < found.got <= 1.0
        assert found.others is not None
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}])
def test_threads_spin_briefly_while_they_wait_unless_told_otherwise(chosen):
    code = (
        "import os\nfrom nogemm.hardware.waiting import sleep_while_waiting\nsleep_while_waiting()\n"
        "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP", "KMP"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | chosen, check=True)
    expected = [chosen.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")] if chosen else [None, "1000"]
    assert done.stdout.split() == [str(value) for value in expected]


def test_the_closing_table_gives_reasons(capsys):
    latency = [
        {"contender": "nogemm-int8", "batch": 1, "length": 16, "us_median": 1e3},
        {"contender": "torch-int8", "batch": 1, "length": 16, "error": "no engine"},
        {"contender": "openvino-f32", "batch": 1, "length": 16, "skipped": "out of time"},
    ]
    result = {
        "title": "t",
        "machine": {"line": "m"},
        "quality": [],
        "recorded": [],
        "latency": latency,
        "notes": ["cut"],
    }
    print_result(result, Path("r.html"), 1.0)
    out = capsys.readouterr().out
    assert "torch-int8 not run: no engine" in out
    assert "openvino-f32 not run: out of time" in out
    assert "\ncut\n" in out


def test_recorded_searches_stand_in_the_report_those_of_this_processor_first(tmp_path, monkeypatch):
    monkeypatch.setattr("nogemm.demo.chain.processor", lambda: "mine")
    for name, kind in (("a/tune-x", "tune"), ("mine/tune-x", "tune"), ("mine/tune-y", "layer"), ("mine/other", "tune")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(f'{{"kind": "{kind}"}}')
    assert [file.parent.name for file in recorded_searches(tmp_path)] == ["mine", "a"]
