"""The precision of the rest follows what was measured, what was asked, and whether there are texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nogemm
from nogemm.export import rest
from nogemm.export.rest import Rest, choose_rest


def test_auto_follows_the_measurement_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "int8_gain", lambda: {128: 2.0, 1024: 1.28})
    assert choose_rest("auto", None, True) == Rest("int8", "int8 products take 0.62 of the time of float ones here")
    monkeypatch.setattr(rest, "int8_gain", lambda: {128: 0.9, 1024: 0.8})  # a processor without dot products
    assert choose_rest("auto", None, True) == Rest("float", "int8 products take 1.18 of the time of float ones here")
    assert choose_rest("auto", True, True) == choose_rest("int8", None, True) == Rest("int8", "as asked")
    assert choose_rest("auto", False, True).precision == "float"
    monkeypatch.setattr(rest, "int8_gain", lambda: pytest.fail("measured for nothing"))
    assert "texts" in choose_rest("auto", None, False).reason
    monkeypatch.setattr(rest.importlib.util, "find_spec", lambda name: None)
    assert "nncf" in choose_rest("auto", None, True).reason
    with pytest.raises(nogemm.ConfigError, match="calibration"):
        choose_rest("int8", None, False)


def test_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOGEMM_CACHE", str(tmp_path))
    monkeypatch.setattr(rest, "ROUNDS", 1)
    monkeypatch.setattr(rest, "TOKENS", (4, 8))
    found = rest._gain_of.__wrapped__("")
    (kept,) = tmp_path.glob("rest-*.json")
    assert {int(n): gain for n, gain in json.loads(kept.read_text()).items()} == found
    assert all(gain > 0 for gain in found.values())
    monkeypatch.setattr(rest, "measure_int8_gain", lambda: {4: 5.0, 8: 5.0})
    assert rest._gain_of.__wrapped__("") == found
    assert rest._gain_of.__wrapped__("AVX2") == {4: 5.0, 8: 5.0}  # held to another instruction set, measured anew
    kept.write_text('{"4": "fast"}')
    assert rest._gain_of.__wrapped__("") == {4: 5.0, 8: 5.0}
