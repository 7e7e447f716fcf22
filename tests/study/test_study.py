"""Runs are made once, failures are rows, changes are refused, and the table is what the runs say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_study import ROWS, RUN, TEXT, faked, outcome, write

import nogemm
import people
from nogemm.bench.report.runs import read_runs
from nogemm.config import parse_layer
from nogemm.errors import ConfigError
from nogemm.study.kinds import Job
from nogemm.study.plan import read_study
from nogemm.study.process import Stopped
from nogemm.study.store import Store, folder_identity
from nogemm.study.timed import words_of
from nogemm.testing.cases import KINDS

STORE = importlib.import_module("nogemm.study.store")
SEARCH = "search: {rates: [5e-3, 1e-2], extend: 1, options: {steps: 2}}\n"


def test_every_run_is_made_once_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, file, out = faked(monkeypatch), write(tmp_path), tmp_path / "out"
    report = nogemm.study(file, out)
    assert fake.names == ["dense/seed-0", "lookup/seed-0", "dense/seed-1", "lookup/seed-1"]
    assert (report.done, report.failed, report.left, report.stopped) == (4, 0, 0, "")
    result = json.loads((out / "lookup" / "seed-1.json").read_text())
    assert result["value"] == pytest.approx(7.1)
    assert (result["kind"], result["row"], result["seed"], result["status"]) == ("study-run", "lookup", 1, "done")
    assert result["key"]["options"]["lr"] == 1e-2
    assert result["machine"] == {"line": "Some CPU"}
    assert len(result["file_sha256"]) == 64
    assert str(tmp_path) not in (out / "lookup" / "seed-1.json").read_text()
    before = {path: path.read_bytes() for path in out.rglob("*.json")}
    assert nogemm.study(file, out).done == 4
    assert len(fake.jobs) == 4
    assert {path: path.read_bytes() for path in out.rglob("*.json")} == before
    assert not list(out.rglob("*.new"))


def test_a_seed_more_is_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, out = faked(monkeypatch), tmp_path / "out"
    nogemm.study(write(tmp_path), out, only=["dense"])
    nogemm.study(write(tmp_path, (TEXT + ROWS).replace("[0, 1]", "[0, 1, 2]")), out, only=["dense"])
    assert fake.names == ["dense/seed-0", "dense/seed-1", "dense/seed-2"]


def test_the_best_rate_is_searched_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def value(job: Job) -> dict[str, Any]:
        return outcome(abs(job.options["lr"] - 0.02))

    fake, out = faked(monkeypatch, value), tmp_path / "out"
    report = nogemm.study(write(tmp_path, TEXT + ROWS + SEARCH), out, only=["dense"])
    assert fake.names == [f"dense/{n}" for n in ("rate-0.005", "rate-0.01", "rate-0.02", "seed-0", "seed-1")]
    assert [job.options["steps"] for job in fake.jobs] == [2, 2, 2, 4, 4]
    assert [job.options["seed"] for job in fake.jobs] == [100, 100, 100, 0, 1]
    assert fake.jobs[-1].options["lr"] == pytest.approx(0.02)
    assert report.table["rows"][0]["lr"] == pytest.approx(0.02)
    assert report.table["rows"][0]["at_edge"]
    assert any("may lie beyond: dense" in note for note in report.table["notes"])


def test_seeds_of_a_row_share_their_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def value(job: Job) -> dict[str, Any]:
        return outcome(abs(job.options["lr"] - 0.01))

    fake, file, out = faked(monkeypatch, value), write(tmp_path, TEXT + ROWS + SEARCH), tmp_path / "out"
    nogemm.study(file, out, only=["dense"])
    (out / "dense" / "rate-0.01.json").unlink()
    (out / "dense" / "seed-1.json").unlink()
    fake.value = lambda job: outcome(abs(job.options["lr"] - 0.005))
    with pytest.raises(nogemm.StudyError, match=r"was made at other rates .*--redo dense"):
        nogemm.study(file, out, only=["dense"])


def test_a_layer_is_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch)
    timed = []

    def bench(args: Any) -> dict[str, Any]:
        timed.append(args)
        if args.method == "dense":
            raise ConfigError("cannot be packed")
        return {"rows": [{"batch": batch, "us_median": 5.0 * batch} for batch in args.batch]}

    monkeypatch.setattr(RUN, "run_layer_bench", bench)
    file = write(tmp_path, TEXT + ROWS + "measure: {latency: {batch: [1, 8], dtype: fp32}}")
    report = nogemm.study(file, tmp_path / "out")
    assert [(args.method, args.d, args.hidden, args.batch) for args in timed] == [
        ("dense", 16, 64, (1, 8)), ("lookup", 16, 64, (1, 8)),
    ]  # fmt: skip
    assert "tables=4" in timed[1].set
    assert [row["us_median"] for row in report.table["rows"][1]["latency"]] == [5.0, 40.0]
    assert any("cannot be packed" in note for note in report.table["notes"])
    nogemm.study(file, tmp_path / "out")
    assert len(timed) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_words_make_it_again(kind: str) -> None:
    assert parse_layer(*words_of(KINDS[kind])) == KINDS[kind]


def test_a_failed_run_is_a_row_and_the_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def value(job: Job) -> dict[str, Any]:
        if (job.layer or {}).get("kind") == "dense":
            return {"status": "failed", "error": "TrainingError: the loss is nan at step 3"}
        return outcome(3.0)

    fake, file, out = faked(monkeypatch, value), write(tmp_path), tmp_path / "out"
    report = nogemm.study(file, out)
    assert (report.done, report.failed, report.left) == (2, 2, 0)
    assert report.table["rows"][0]["errors"][0] == {"seed": 0, "error": "TrainingError: the loss is nan at step 3"}
    assert report.table["rows"][0]["mean"] is None
    assert nogemm.study(file, out).failed == 2
    assert len(fake.jobs) == 4
    fake.value = lambda job: outcome(4.0)
    assert nogemm.study(file, out, retry=True).failed == 0
    assert fake.names[4:] == ["dense/seed-0", "dense/seed-1"]


def test_a_loss_that_is_no_number_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, lambda job: outcome(3.0) | {"figures": outcome(3.0)["figures"] | {"validation_loss": None}})
    report = nogemm.study(write(tmp_path), tmp_path / "out")
    assert report.failed == 4
    assert "validation loss is not a finite number" in report.table["notes"][0]


def test_a_row_whose_trials_all_fail_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = faked(monkeypatch, lambda job: {"status": "failed", "error": "MemoryError: "})
    report = nogemm.study(write(tmp_path, TEXT + ROWS + SEARCH), tmp_path / "out", only=["dense"])
    assert fake.names == ["dense/rate-0.005", "dense/rate-0.01"]
    assert report.table["rows"][0]["errors"][0]["error"].startswith("no rate of its search")


def test_a_changed_row_over_old_results_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, out = faked(monkeypatch), tmp_path / "out"
    nogemm.study(write(tmp_path), out)
    changed = write(tmp_path, (TEXT + ROWS).replace("tables: 4", "tables: 8"))
    with pytest.raises(
        nogemm.StudyError, match=r"'lookup' has changed.*layer.tables: 4, now 8.*--output.*--redo lookup"
    ):
        nogemm.study(changed, out)
    assert len(fake.jobs) == 4
    assert json.loads((out / "lookup" / "seed-0.json").read_text())["key"]["layer"]["tables"] == 4
    nogemm.study(changed, out, redo=["lookup"])
    assert fake.names[4:] == ["lookup/seed-0", "lookup/seed-1"]
    other = write(tmp_path / "other", (TEXT + ROWS).replace("steps: 4", "steps: 5"))
    with pytest.raises(nogemm.StudyError, match=r"options\.steps: 4, now 5"):
        nogemm.study(other, out)
    (tmp_path / "texts.txt").write_text("a text")
    with pytest.raises(nogemm.StudyError, match=r"data\.name: sample, now texts\.txt"):
        nogemm.study(changed, out, data=f"{tmp_path}/texts.txt")


def test_a_changed_row_over_old_trials_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(job: Job) -> dict[str, Any]:
        if not job.trial:
            raise Stopped
        return outcome(1.0)

    fake, out = faked(monkeypatch, value), tmp_path / "out"
    nogemm.study(write(tmp_path, TEXT + ROWS + SEARCH), out)
    before = len(fake.jobs)
    with pytest.raises(nogemm.StudyError, match=r"'lookup' has changed since .*rate-0\.005\.json.*tables: 4, now 8"):
        nogemm.study(write(tmp_path, (TEXT + ROWS + SEARCH).replace("tables: 4", "tables: 8")), out, only=["dense"])
    assert len(fake.jobs) == before


def test_nothing_is_deleted_where_the_study_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch)
    out = tmp_path / "out"
    nogemm.study(write(tmp_path), out)
    with pytest.raises(nogemm.StudyError, match="another study"):
        nogemm.study(write(tmp_path, name="other.yaml"), out, redo=["all"])
    changed = write(tmp_path, (TEXT + ROWS).replace("tables: 4", "tables: 8"))
    with pytest.raises(nogemm.StudyError, match="'lookup' has changed"):
        nogemm.study(changed, out, redo=["dense"])
    assert len(list(out.glob("*/seed-*.json"))) == 4


def test_another_model_under_the_same_name_is_another_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, lambda job: outcome(1.0, agreement=0.5))
    people.bert(tmp_path / "model")
    text = "kind: distil\nmodel: model\nrows: [{name: a, method: null, keep: [0]}]"
    out = tmp_path / "out"
    assert nogemm.study(write(tmp_path, text), out).done == 1
    result = out / "a" / "seed-0.json"
    key = json.loads(result.read_text())
    assert key["key"]["model"]["name"] == "model"
    older = key | {"key": key["key"] | {"model": "model"}}  # what an older version wrote: the name alone
    result.write_text(json.dumps(older))
    assert nogemm.study(write(tmp_path, text), out).done == 1
    result.write_text(json.dumps(key))
    (tmp_path / "model" / "config.json").write_text((tmp_path / "model" / "config.json").read_text() + "\n")
    folder_identity.cache_clear()
    with pytest.raises(nogemm.StudyError, match=r"model\.sha256"):
        nogemm.study(write(tmp_path, text), out)


def test_layers_to_keep_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = faked(monkeypatch)
    people.bert(tmp_path / "model")
    text = "kind: distil\nmodel: model\nrows: [{name: a, method: null, keep: [0, 7]}]"
    with pytest.raises(ConfigError, match=r"row 'a': keep_layers: numbers from 0 to 1"):
        nogemm.study(write(tmp_path, text), tmp_path / "out")
    assert fake.jobs == []


def test_options_that_change_nothing_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, out = faked(monkeypatch), tmp_path / "out"
    nogemm.study(write(tmp_path), out)
    nogemm.study(write(tmp_path, (TEXT + ROWS).replace("lr: 1e-2", "lr: 1e-2, log_seconds: 5")), out)
    assert len(fake.jobs) == 4


def test_another_study_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch)
    nogemm.study(write(tmp_path), tmp_path / "out")
    with pytest.raises(nogemm.StudyError, match="holds the results of another study, 'small'"):
        nogemm.study(write(tmp_path, name="other.yaml"), tmp_path / "out")


def test_a_damaged_result_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch)
    nogemm.study(write(tmp_path), tmp_path / "out")
    (tmp_path / "out" / "dense" / "seed-0.json").write_text('{"kind": ')
    with pytest.raises(nogemm.StudyError, match=r"seed-0\.json is no result of a study: delete it"):
        nogemm.study(write(tmp_path), tmp_path / "out")


def test_unknown_rows_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch)
    with pytest.raises(ConfigError, match=r"no row 'lokup'; did you mean 'lookup'"):
        nogemm.study(write(tmp_path), tmp_path / "out", only=["lokup"])
    with pytest.raises(ConfigError, match=r"no row 'lokup'; did you mean 'lookup'"):
        nogemm.study(write(tmp_path), tmp_path / "out", redo=["lokup"])


def test_a_second_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, file, out = faked(monkeypatch), write(tmp_path), tmp_path / "out"
    out.mkdir()
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(out / "lock")], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(nogemm.StudyError, match=r"another study is going on in .*out"):
            nogemm.study(file, out)
        other.kill()
    assert fake.jobs == []
    assert nogemm.study(file, out).done == 4


def test_a_full_disk_ends_the_study_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, file, out = faked(monkeypatch), write(tmp_path), tmp_path / "out"
    nogemm.study(file, out, only=["dense"])

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(STORE, "write_json", full)
        patch.setattr(Store, "begin", lambda store: None)
        with pytest.raises(nogemm.StudyError, match=r"seed-0\.json cannot be written.*No space left.*Make room"):
            nogemm.study(file, out)
    with monkeypatch.context() as patch:
        patch.setattr(STORE, "write_json", full)
        with pytest.raises(nogemm.StudyError, match=r"study\.json cannot be written.*No space left.*Make room"):
            nogemm.study(file, out)
    assert not (out / "lookup").exists()
    assert nogemm.study(file, out).done == 4
    assert fake.names[2:] == ["lookup/seed-0", "lookup/seed-0", "lookup/seed-1"]


def test_time_ends_a_study_and_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def value(job: Job) -> dict[str, Any]:
        if job.options["seed"] == 1:
            raise Stopped
        return outcome(3.0)

    fake, file, out = faked(monkeypatch, value), write(tmp_path), tmp_path / "out"
    assert nogemm.study(file, out, max_seconds=0.0).left == 4
    assert fake.jobs == []
    report = nogemm.study(file, out, max_seconds=1000.0)
    assert (report.stopped, report.done, report.left) == ("time", 2, 2)
    fake.value = lambda job: outcome(3.0)
    assert nogemm.study(file, out).left == 0


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def value(job: Job) -> dict[str, Any]:
        raise KeyboardInterrupt

    faked(monkeypatch, value)
    with pytest.raises(nogemm.StudyInterrupted, match="The same command goes on where it was"):
        nogemm.study(write(tmp_path), tmp_path / "out")


def test_the_key_of_a_run_holds_no_folder(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a text")
    plan = read_study(write(tmp_path), data=str(tmp_path / "texts.txt"))
    key = Store(plan, tmp_path / "out").key(Store(plan, tmp_path / "out").final(plan.rows[0], 0))
    assert key["data"]["name"] == "texts.txt"
    assert str(tmp_path) not in json.dumps(key)


def test_the_table_is_made_from_the_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch)
    report = nogemm.study(write(tmp_path), tmp_path / "out")
    table = read_runs(tmp_path / "out")
    assert table == report.table
    dense, lookup = table["rows"]
    assert dense["mean"]["value"] == pytest.approx(3.05)
    assert lookup["difference"]["value"] == pytest.approx(4.0)
    assert lookup["difference"]["high"] - lookup["difference"]["low"] < 1e-6
    assert dense["mean"]["high"] - dense["mean"]["low"] > 1.0
    with pytest.raises(ConfigError, match=r"study\.json is missing"):
        read_runs(tmp_path)
