"""The head of every result file, and the names of our contenders."""

from __future__ import annotations

import json

import pytest

from nogemm.bench.engine.result import origin, our_names
from nogemm.errors import ConfigError


def test_origin_can_be_written_and_holds_the_seed() -> None:
    head = json.loads(json.dumps(origin({"seed": 3})))
    assert head["settings"] == {"seed": 3}
    assert head["isa"]
    assert head["machine"]["versions"]["torch"]


def test_names_keep_their_order_once() -> None:
    assert our_names("int8") == ["nogemm-int8"]
    assert our_names("int8, fp32,int8") == ["nogemm-int8", "nogemm-fp32"]
    with pytest.raises(ConfigError, match="got 'fp8'"):
        our_names("fp32,fp8")
