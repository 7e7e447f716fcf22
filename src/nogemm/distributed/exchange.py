"""Tensors from each rank to all others: over shared memory on one machine, else over torch.distributed.

Only collectives that every backend has are used (all_gather, all_reduce), on tensors where they lie: NCCL
carries those of a GPU, gloo those of a CPU.
"""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nogemm.config import check_choice
from nogemm.distributed import shared
from nogemm.distributed.report import Traffic
from nogemm.errors import ConfigError, DistributedError

TransportName = Literal["auto", "shared", "group"]
TRANSPORTS = ("auto", "shared", "group")


class Exchange:
    """Carries small tensors between ranks; made by `join`, and shared by all sharded modules of a process.

    Attributes:
        rank, ranks: this one, and how many there are.
        timeout: seconds that an exchange waits for the slowest rank.
        why_not_shared: why the ranks do not share memory; None where they do, or where nobody asked.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        timeout: float,
        memory: shared.SharedMemory | None = None,
        why_not_shared: str | None = None,
    ) -> None:
        self.group, self.timeout, self.why_not_shared = group, timeout, why_not_shared
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self._memory = memory
        self._broken: str | None = None

    @property
    def transport(self) -> str:
        """What carries tensors of a CPU: "shared memory", the group's backend, or "none" of a single rank."""
        if self.group is None:
            return "none"
        return "shared memory" if self._memory is not None else dist.get_backend(self.group)

    def gather(self, x: Tensor, traffic: Traffic) -> Tensor:
        """Collect a tensor of the same shape and dtype from every rank, [P, ...].

        Raises:
            DistributedError: see `Exchange.total`.
        """
        if self.group is None or not x.numel():
            return x.unsqueeze(0).expand(self.ranks, *x.shape)
        x = x.contiguous()
        with self._counted(traffic):
            traffic.list_bytes += x.numel() * x.element_size()
            found = x.new_empty((self.ranks, *x.shape))
            if self._memory is None or x.device.type != "cpu":
                self._wait(dist.all_gather(list(found.unbind()), x, group=self.group, async_op=True))
                return found
            into_PB, bytes_B = found.view(self.ranks, -1).view(torch.uint8), x.view(-1).view(torch.uint8)
            for at in range(0, bytes_B.numel(), shared.PLACE):
                piece = slice(at, at + shared.PLACE)
                into_PB[:, piece] = self._memory.gather(bytes_B[piece], self.timeout)
            return found

    def total(self, x: Tensor, traffic: Traffic) -> Tensor:
        """Add up a float32 tensor of all ranks; every rank gets the same bits from shared memory, in rank order.

        Raises:
            DistributedError: a rank has ended, did not come within the timeout, or made another call. The exchange
                cannot be used any more: the ranks no longer agree on what comes next.
        """
        if self.group is None or not x.numel():
            return x
        x = x.contiguous()
        with self._counted(traffic):
            traffic.output_bytes += x.numel() * x.element_size()
            found = x.clone()
            if self._memory is None or x.device.type != "cpu":
                self._wait(dist.all_reduce(found, group=self.group, async_op=True))
                return found
            flat, place = found.view(-1), shared.PLACE // x.element_size()
            for piece in flat.split(place):
                said_PB = self._memory.gather(piece.view(torch.uint8), self.timeout)
                piece.copy_(said_PB.view(x.dtype).sum(0))
            return found

    def close(self) -> None:
        """Leave: ranks that wait for this one are told at once where memory is shared, else at their timeout."""
        self._broken = "it was closed"
        if self._memory is not None:
            self._memory.close()

    def __reduce__(self) -> str:
        """Refuse copies: two of them would speak in one rank's name."""
        raise ConfigError("an exchange between ranks cannot be copied or pickled, nor can a sharded module")

    @contextmanager
    def _counted(self, traffic: Traffic) -> Iterator[None]:
        if self._broken is not None:
            raise DistributedError(f"the exchange of rank {self.rank} cannot be used any more: {self._broken}")
        start = time.perf_counter()
        try:
            yield
        except BaseException as error:  # Ctrl-C too: this rank has taken part in an unknown part of the exchange
            self.close()
            self._broken = str(error) or type(error).__name__
            raise
        finally:
            traffic.calls += 1
            traffic.seconds += time.perf_counter() - start

    def _wait(self, work: dist.Work | None) -> None:
        if work is None:
            return
        try:
            work.wait(datetime.timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise DistributedError(
                f"rank {self.rank}: another rank ended, did not answer within {self.timeout:g} seconds, or made "
                f"another call: {error}"
            ) from error


def join(
    group: dist.ProcessGroup | None = None, *, transport: TransportName = "auto", timeout: float = 60.0
) -> Exchange:
    """Join the ranks of a group for sharded heads and FFNs; every rank of the group calls it.

    Args:
        group: of torch.distributed; None: all ranks. Where torch.distributed was not initialised there is one rank.
        transport: "shared": memory that the ranks of one machine share; "group": the group's own backend; "auto": the
            first where all ranks can, else the second. Tensors of a GPU go by the group in any case.
        timeout: seconds after which a rank that does not answer is an error.
    Raises:
        ConfigError: the launcher started several processes, but torch.distributed is not initialised; "shared" where
            that cannot be; an argument is out of range.
        DistributedError: a rank did not come.
    Cost: a new group; with shared memory 2 MiB a rank.
    """
    check_choice("join", "transport", transport, TRANSPORTS)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise ConfigError(f"join: timeout must be a number of seconds above 0, got {timeout!r}")
    if not dist.is_available() or not dist.is_initialized():
        started = os.environ.get("WORLD_SIZE", "1")
        if group is not None or started not in ("", "1"):
            raise ConfigError(
                f"join: {started} processes were started, but torch.distributed does not know of the others; call "
                "torch.distributed.init_process_group() first"
            )
        return Exchange(None, timeout)
    if group is not None and dist.get_rank(group) < 0:
        raise ConfigError("join: this process is not in the group")
    own = _own_group(group, timeout)
    exchange = Exchange(own, timeout)
    if transport == "group" or exchange.ranks == 1:
        return exchange
    memory, why_not = _share(exchange)
    if memory is None and transport == "shared":
        raise ConfigError(f'join: transport="shared" is not possible: {why_not}')
    return Exchange(own, timeout, memory, why_not)


def _own_group(group: dist.ProcessGroup | None, timeout: float) -> dist.ProcessGroup:
    """Make a group of the same ranks whose operations end after `timeout`, and that nobody else speaks in."""
    patience = datetime.timedelta(seconds=timeout)
    try:
        if group is None:
            return dist.new_group(timeout=patience)  # type: ignore[return-value]
        ranks = dist.get_process_group_ranks(group)
        return dist.new_group(ranks, timeout=patience, use_local_synchronization=True)  # type: ignore[return-value]
    except RuntimeError as error:
        raise DistributedError(f"join: not all ranks came: {error}") from error


def _share(exchange: Exchange) -> tuple[shared.SharedMemory | None, str | None]:
    """Map one memory on all ranks, or on none; then also return why."""
    if dist.get_backend(exchange.group) == "nccl":
        return None, "the group carries tensors of GPUs alone"
    file, number, why = None, 0, shared.unusable()
    try:
        if exchange.rank == 0 and why is None:
            try:
                file, number = shared.create(exchange.ranks)
            except OSError as error:
                why = f"rank 0 got no memory: {error.strerror}"
        number_of_0 = int(exchange.gather(torch.tensor([number]), Traffic())[0])
        if exchange.rank > 0 and why is None and number_of_0:
            try:
                file = shared.attach(number_of_0)
            except OSError:
                why = f"rank {exchange.rank} does not see rank 0's memory: another machine, or another container"
        memory = None
        if file is not None and why is None:
            try:
                memory = shared.SharedMemory(file, exchange.rank, exchange.ranks)
            except OSError as error:
                why = f"rank {exchange.rank} cannot map the memory: {error.strerror}"
        ready_P = exchange.gather(torch.tensor([memory is not None]), Traffic()).flatten()
    finally:
        if exchange.rank == 0 and number:
            shared.remove(number)
    if bool(ready_P.all()):
        return memory, None
    if memory is not None:
        memory.close()
    missing = int((~ready_P).int().argmax())
    return None, why or f"rank {missing} cannot share memory with rank 0"
