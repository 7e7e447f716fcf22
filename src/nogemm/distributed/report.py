"""What a sharded module sent, how long that took, and what its selection is expected to find."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Counts what one module handed to the other ranks.

    Attributes:
        calls: exchanges.
        list_bytes: of small lists, and of logits where all were asked for; counted once however many ranks read them.
        output_bytes: this rank's outputs that were added up.
        naive_bytes: what this rank would have sent in the same calls if scores of all its rows had travelled, float32.
        seconds: inside exchanges, waiting for the slowest rank included.
    """

    calls: int = 0
    list_bytes: int = 0
    output_bytes: int = 0
    naive_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ShardReport:
    """What a sharded head or FFN did on this rank since it was made.

    Attributes:
        transport: what carries its tensors: "shared memory", a backend of torch.distributed such as "gloo", or "none"
            of a single rank.
        rows: how many rows (neurons) each rank holds.
        calls, bytes_sent, output_bytes, naive_bytes, seconds: as in `Traffic`; bytes_sent are those of lists.
        expected_recall: the share of the true winners that the ranks' own choices hold, on average: of an FFN's
            neurons, or of the last `top_k` of a head. 1 where nothing can be lost.
    """

    transport: str
    rows: tuple[int, ...]
    calls: int
    bytes_sent: int
    output_bytes: int
    naive_bytes: int
    seconds: float
    expected_recall: float

    @property
    def share(self) -> float:
        """Bytes sent as a share of the naive gather's; 0 before the first call."""
        return self.bytes_sent / self.naive_bytes if self.naive_bytes else 0.0


def report_of(traffic: Traffic, transport: str, rows: tuple[int, ...], expected_recall: float) -> ShardReport:
    """Freeze the counts of a module."""
    return ShardReport(
        transport=transport,
        rows=rows,
        calls=traffic.calls,
        bytes_sent=traffic.list_bytes,
        output_bytes=traffic.output_bytes,
        naive_bytes=traffic.naive_bytes,
        seconds=traffic.seconds,
        expected_recall=expected_recall,
    )
