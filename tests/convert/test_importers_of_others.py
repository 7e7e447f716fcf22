"""Each importer refuses what the others read, and says which keys it misses."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import test_importers
import test_importers_fff
import test_tree_importer

import nogemm

READERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "lookupffn": (nogemm.importers.lookupffn, test_importers.reference_state(16, 4, 3, 4, 16)),
    "fastfeedforward": (nogemm.importers.fastfeedforward, test_importers_fff.reference_state(2, 16, 3, 16)),
    "ultrafastbert": (
        functools.partial(nogemm.importers.ultrafastbert, trees=1),
        test_tree_importer.reference_state(16, 1, 3, 16),
    ),
}


@pytest.mark.parametrize(("reader", "source"), itertools.permutations(READERS, 2))
def test_a_checkpoint_of_another_method_is_refused(reader: str, source: str) -> None:
    read, own = READERS[reader]
    read(own)
    other = READERS[source][1]
    with pytest.raises(nogemm.CheckpointError, match="missing: ") as refused:
        read(other)
    assert any(key in str(refused.value) for key in own)
