"""Exported decoders in mode "deferred": the exact mode's tokens, whatever the search finds; going back; samples."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoders
import nogemm
import people
from nogemm import GenerationReport, HeadConfig
from nogemm.decoding.windows import Windows
from nogemm.export import OpenVINODecoder, export_decoder
from nogemm.export import decoder_graph as dg
from nogemm.export.folder import RECORD
from nogemm.export.openvino_host import load
from nogemm.testing.compare import Mismatch, check_equal

NEW, EVERY = 30, 5
POOR: dict[str, Any] = {"leading": 4, "sketch": 4, "rows": 1}  # a search that is often wrong
SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 5, "temperature": 1.5}
GENAI = importlib.util.find_spec("openvino_genai") is None


def exported(kind: str, folder: Path, body: str = "float", **choices: Any) -> Any:
    """Export with a deferred head; return the torch model with an exact one."""
    model = decoders.make(kind)
    nogemm.convert_head(model, HeadConfig(mode="deferred", verify_every=EVERY, **{**POOR, **choices}))
    export_decoder(model, folder, body=body, rows="fp32")
    exact = decoders.make(kind)
    nogemm.convert_head(exact)
    return exact


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("deferred") / "llama"
    return exported("llama tied", folder), folder


def pair(folder: Path, precision: str | None = "f32") -> tuple[OpenVINODecoder, OpenVINODecoder]:
    """Return an export in mode "exact" and as it was exported."""
    exact = OpenVINODecoder(folder, threads=1, precision=precision, mode="exact")
    deferred = OpenVINODecoder(folder, threads=1, precision=precision)
    assert (exact.mode, deferred.mode) == ("exact", "deferred")
    return exact, deferred


def held(decoder: OpenVINODecoder) -> dict[str, np.ndarray]:
    return {variable.name: variable.state.data.copy() for variable in decoder._memory.request.query_state()}


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("precision", ["f32", None])
def test_tokens_and_memory_are_those_of_the_exact_mode(
    how: dict[str, Any], precision: str | None, llama: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, deferred = pair(llama[1], precision)
    ids, report = decoders.prompts(2, 7), GenerationReport()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = exact.generate(ids, NEW, attention_mask=mask, **how)
    check_equal("tokens", deferred.generate(ids, NEW, attention_mask=mask, report=report, **how), expected)
    assert report.tokens == 2 * NEW
    assert report.proofs >= NEW / EVERY
    assert report.differences > 0
    assert len(report.rows) > 4 * NEW  # a search and a proof of each token, and those in vain
    one, other = held(exact), held(deferred)
    assert one.keys() == other.keys()
    assert len(one) == 4
    for name, keys in one.items():
        assert keys.shape[2] == ids.shape[1] + NEW - 1
        np.testing.assert_array_equal(other[name], keys)
    monkeypatch.setattr(Windows, "_prove", lambda self, states, tokens, over: tokens)
    with pytest.raises(Mismatch):
        check_equal("without a proof", deferred.generate(ids, NEW, attention_mask=mask, **how), expected)


@pytest.mark.parametrize(("kind", "body"), [("gemma3 sliding", "int4"), ("granite scaled", "float")])
def test_other_kinds_and_samples(kind: str, body: str, tmp_path: Path) -> None:
    model = exported(kind, tmp_path / "out", body)
    exact, deferred = pair(tmp_path / "out")
    ids = decoders.prompts(1, 11)
    ways: tuple[dict[str, Any], ...] = ({}, SAMPLED)
    for how in ways:
        report = GenerationReport()
        expected = exact.generate(ids, NEW, **how)
        check_equal("tokens", deferred.generate(ids, NEW, report=report, **how), expected)
        assert report.differences > 0
        if body == "float":
            check_equal("torch's", nogemm.generate(model, ids, NEW, **how), expected)
    assert not torch.equal(exact.generate(ids, NEW, **{**SAMPLED, "seed": 6}), expected)


def test_a_good_search_is_not_taken_back(tmp_path: Path) -> None:
    exported("llama", tmp_path / "out", leading=24, sketch=24, rows=64)
    exact, deferred = pair(tmp_path / "out")
    ids, report = decoders.prompts(1, 5), GenerationReport()
    check_equal("tokens", deferred.generate(ids, NEW, report=report), exact.generate(ids, NEW))
    assert (report.proofs, report.differences) == (NEW // EVERY, 0)
    assert report.rows.count(64) == NEW
    assert exact.bytes_per_token == exact.record["bytes_per_token"]
    record, own = exact.record, decoders.V * 24 * 4
    assert record["search_rows"] * 24 * 4 < record["deferred_head_bytes_per_token"] < own


def test_streams_and_ends_that_are_proven(llama: tuple[Any, Path]) -> None:
    exact, deferred = pair(llama[1])
    ids, kept, drafts = decoders.prompts(), [], []
    found = deferred.generate(ids, NEW, streamer=kept.append, draft_streamer=drafts.append)
    check_equal("kept", torch.stack(kept, 1), found[:, 5:])
    assert len(drafts) > len(kept) == NEW
    wrong = sorted({int(token) for token in drafts} - set(found[0].tolist()))
    assert wrong
    check_equal("an end in vain", deferred.generate(ids, NEW, eos_token_id=wrong), found)
    end = int(found[0, 5 + 8])
    short = deferred.generate(ids, NEW, eos_token_id=end)
    check_equal("an end", short, exact.generate(ids, NEW, eos_token_id=end))
    assert short.shape[1] <= 5 + 9
    both = decoders.prompts(3, 6)
    expected = exact.generate(both, NEW, eos_token_id=end)
    check_equal("ends of a batch", deferred.generate(both, NEW, eos_token_id=end), expected)


class _Words:
    """A tokenizer of one word a token."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"<{int(token)}>" for token in ids)


@pytest.mark.parametrize("mode", ["exact", "deferred"])
def test_it_ends_behind_a_string_as_the_torch_model_does(mode: str, llama: tuple[Any, Path]) -> None:
    model, folder = llama
    decoder = OpenVINODecoder(folder, threads=1, precision="f32", mode=mode)
    ids = decoders.prompts(2, 6)
    whole = decoder.generate(ids, NEW)
    word = f"<{int(whole[0, 12])}><{int(whole[0, 13])}>"
    how: dict[str, Any] = {"stop_strings": [word, "never"], "tokenizer": _Words()}
    got = decoder.generate(ids[:1], NEW, **how)
    check_equal("one text", got, whole[:1, :14])
    assert decoder._memory.length == 13
    check_equal("and on", decoder.generate(got, NEW - 8), whole[:1])
    both = decoder.generate(ids, NEW, eos_token_id=[9], **how)
    check_equal("a batch", both, nogemm.generate(model, ids, NEW, eos_token_id=[9], pad_token_id=9, **how))
    with pytest.raises(Mismatch):
        check_equal("another string", decoder.generate(ids[:1], NEW, stop_strings="never", tokenizer=_Words()), got)


def test_streamers_of_transformers(llama: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    import transformers as tf

    words: Any = _Words()
    decoder = OpenVINODecoder(llama[1], threads=1)
    found = decoder.generate(decoders.prompts(), 4, streamer=tf.TextStreamer(words))
    assert capsys.readouterr().out == words.decode(found[0]) + "\n"


def test_bad_arguments_are_named(llama: tuple[Any, Path]) -> None:
    decoder = OpenVINODecoder(llama[1], threads=1)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("attention_mask must be a tensor like input_ids, got list", {"attention_mask": [[1] * 5]}),
        ("temperature=0.5 needs do_sample=True", {"temperature": 0.5}),
        ("seed=1 needs do_sample=True", {"seed": 1}),
        ("temperature must be a finite number above 0, got 'x'", {"do_sample": True, "temperature": "x"}),
        ("stop_strings need the model's tokenizer", {"stop_strings": "x"}),
        ("eos_token_id must be a token or several, got 'x'", {"eos_token_id": "x"}),
        ("streamer must be a function of tokens, or have put and end, got int", {"streamer": 3}),
    ]
    for words, more in cases:
        with pytest.raises(nogemm.ConfigError, match=words):
            decoder.generate(decoders.prompts(), 2, **more)


class _Interrupted:
    """A request whose call number `at` is interrupted, before its work or behind it."""

    def __init__(self, request: Any, at: int, behind: bool) -> None:
        self.request, self.at, self.behind, self.sizes = request, at, behind, list[int]()

    def infer(self, inputs: dict[str, Any], **more: Any) -> Any:
        self.sizes.append(inputs["input_ids"].shape[1])
        if len(self.sizes) == self.at and not self.behind:
            raise KeyboardInterrupt
        found = self.request.infer(inputs, **more)
        if len(self.sizes) == self.at:
            raise KeyboardInterrupt
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.request, name)


@pytest.mark.parametrize("at", [1, 2, 14, 18])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("mode", ["exact", "deferred"])
def test_it_goes_on_after_an_interruption(at: int, behind: bool, mode: str, llama: tuple[Any, Path]) -> None:
    decoder = OpenVINODecoder(llama[1], threads=1, precision="f32", mode=mode)
    ids, seen = decoders.prompts(2, 6), list[torch.Tensor]()
    whole = decoder.generate(ids, NEW)
    decoder.generate(decoders.prompts(2, 3), 2)
    memory = decoder._memory
    memory.request = watched = _Interrupted(memory.request, at, behind)
    with pytest.raises(KeyboardInterrupt):
        decoder.generate(ids, NEW, streamer=seen.append)
    so_far = torch.cat((ids, *(token.unsqueeze(1) for token in seen)), 1)
    check_equal("so far", so_far, whole[:, : so_far.shape[1]])
    assert memory.length == (so_far.shape[1] - 1 if seen else 0)
    watched.sizes.clear()
    watched.at = 0
    check_equal("the rest", decoder.generate(so_far, ids.shape[1] + NEW - so_far.shape[1]), whole)
    assert set(watched.sizes[1:]) == {1}
    assert watched.sizes[0] == (1 if seen else 6)  # what was proven is not run again


@pytest.mark.parametrize("at", [1, 8, 10])
def test_a_streamer_may_interrupt(at: int, llama: tuple[Any, Path]) -> None:
    _, decoder = pair(llama[1])
    ids, seen = decoders.prompts(1, 6), list[torch.Tensor]()
    whole = decoder.generate(ids, NEW)

    def stop(token: torch.Tensor) -> None:
        seen.append(token)
        if len(seen) == at:
            raise KeyboardInterrupt

    ways: tuple[dict[str, Any], ...] = ({"streamer": stop}, {"draft_streamer": stop})
    for streamers in ways:
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(ids, NEW, **streamers)
        kept = at if "streamer" in streamers else 0
        if kept:
            assert decoder._memory.length == ids.shape[1] + kept - 1
        so_far = whole[:, : ids.shape[1] + kept]
        check_equal("the rest", decoder.generate(so_far, NEW - kept), whole)


def test_a_memory_that_lost_tokens_begins_anew(llama: tuple[Any, Path]) -> None:
    _, decoder = pair(llama[1])
    ids = decoders.prompts(1, 6)
    whole = decoder.generate(ids, NEW)
    memory = decoder._memory
    memory.request.reset_state()
    memory.cut(9)
    assert memory.length == 0
    check_equal("anew", decoder.generate(ids, NEW), whole)


def test_search_and_proof_share_rows_and_codes(llama: tuple[Any, Path]) -> None:
    record = json.loads((llama[1] / RECORD).read_text())
    extension = llama[1] / record["extension"]
    graph, factory = load(llama[1] / record["model"], extension), dg.Factory(extension)
    graphs = dg.choose_tokens(graph, factory, 8), dg.proof_graph(graph, factory)
    names = [{name for item in each.outputs for name in item.get_names()} for each in graphs]
    assert names == [{"token", "state"}, {"token", "exact"}]
    places = []
    for each, kind in zip(graphs, ("HeadSearch", "HeadArgmax"), strict=True):
        (node,) = (node for node in each.get_ops() if node.get_type_name() in ("HeadSearch", "HeadArgmax"))
        assert node.get_type_name() == kind
        places.append([node.input_value(i).get_node().get_data().ctypes.data for i in (1, 2)])
    assert places[0] == places[1]
    assert not [node for node in graphs[0].get_ops() if node.get_type_name() == "PeakLogits"]


@pytest.mark.skipif(GENAI, reason="openvino-genai is not installed")
def test_genai_runs_it_as_an_exact_one(llama: tuple[Any, Path]) -> None:
    folder = llama[1]
    ids = decoders.prompts(1, 6)
    assert decoders.genai_tokens(folder, ids, NEW) == pair(folder)[1].generate(ids, NEW)[0, 6:].tolist()


def test_what_cannot_be(llama: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(nogemm.ConfigError, match="mode must be one of exact, deferred, got 'fast'"):
        OpenVINODecoder(llama[1], mode="fast")
    decoder = OpenVINODecoder(llama[1], threads=1)
    with pytest.raises(nogemm.ConfigError, match="temperature must be a finite number above 0"):
        decoder.generate(decoders.prompts(), 3, do_sample=True, temperature=0)
    older = tmp_path / "older"
    shutil.copytree(llama[1], older)
    record = json.loads((older / RECORD).read_text())
    for name in ("mode", "verify_every", "search_rows", "scale", "cap", "deferred_head_bytes_per_token"):
        del record[name]
    (older / RECORD).write_text(json.dumps(record))
    with pytest.raises(nogemm.ConfigError, match="mode='deferred' needs a newer export"):
        OpenVINODecoder(older, mode="deferred")
    old = OpenVINODecoder(older, threads=1)
    assert old.mode == "exact"
    ids = decoders.prompts()
    check_equal("older", old.generate(ids, 9), decoder.generate(ids, 9))
    with pytest.raises(nogemm.ConfigError, match="do_sample needs a newer export"):
        old.generate(decoders.prompts(), 3, do_sample=True)
    record["cap"], record["mode"], record["scale"] = 3.0, "exact", 1.0
    (older / RECORD).write_text(json.dumps(record))
    with pytest.raises(nogemm.ConfigError, match="caps its logits"):
        OpenVINODecoder(older, threads=1).generate(decoders.prompts(), 3, do_sample=True)


def test_a_dense_head_samples_and_is_not_searched(tmp_path: Path, llama: tuple[Any, Path]) -> None:
    export_decoder(decoders.make("llama tied"), tmp_path / "dense", body="float", rows="fp32")
    with pytest.raises(nogemm.ConfigError, match="this export has a dense one"):
        OpenVINODecoder(tmp_path / "dense", mode="deferred")
    dense = OpenVINODecoder(tmp_path / "dense", threads=1, precision="f32")
    assert dense.mode is None
    ids = decoders.prompts(2, 6)
    check_equal("samples", dense.generate(ids, NEW, **SAMPLED), pair(llama[1])[0].generate(ids, NEW, **SAMPLED))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = people.gpt2(tmp_path / "gpt2")
    out = tmp_path / "out"
    words = ("export", model, out, "--generate", "--body", "float", "--mode", "deferred")
    assert people.run(*words, "--json", tmp_path / "e.json") == 0
    assert "exact head, proofs of 16 tokens together" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())["mode"] == "deferred"
    assert OpenVINODecoder(out).mode == "deferred"
    assert people.run(*words[:-1], "quick") == 2
    assert "--mode must be exact or deferred" in capsys.readouterr().err
    assert people.run(*words, "--head", "dense") == 2
    assert "--mode deferred is of an exact head" in capsys.readouterr().err
