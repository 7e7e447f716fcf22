"""Pairs of descriptions: one a package, own and others', all of one section and split, the same in every run."""

from __future__ import annotations

from benchmark_scripts import load
from nogemm.train.sources import split_of

pairs = load("pairs")
ROWS = [
    {"name": f"p{i}", "section": "ab"[i % 2], "short": f"short {i}", "long": f"Long {chr(97 + i % 26)} {i * 7919}"}
    for i in range(300)
]


def test_pairs_match_or_come_from_the_same_section_and_split() -> None:
    alone = {"name": "q", "section": "c", "short": "alone", "long": "Nothing like it"}
    found = list(pairs.pairs([*ROWS, alone]))
    assert found == list(pairs.pairs([*ROWS, alone]))
    assert len(found) == len(ROWS)  # the one that is alone has nobody to be confused with
    by_short, by_long = {row["short"]: row for row in ROWS}, {row["long"]: row for row in ROWS}
    for pair in found:
        one, other = by_short[pair["text"]], by_long[pair["text2"]]
        assert pair["label"] == int(one is other)
        assert one["section"] == other["section"]
        assert pair["split"] == split_of(one) == split_of(other)
    assert 0.4 < sum(pair["label"] for pair in found) / len(found) < 0.6
    assert {pair["split"] for pair in found} == {"train", "validation", "test"}
