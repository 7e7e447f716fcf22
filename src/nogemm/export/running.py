"""Run an exported decoder in plain OpenVINO: our own loop over the memory that the graph keeps.

Legend: B sequences, L tokens of the prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogemm.decoding.generate import GenerationReport
from nogemm.errors import CheckpointError, ConfigError, NotFiniteError
from nogemm.export import decoder_graph as dg
from nogemm.export import openvino_host as host
from nogemm.export.decoder_check import step
from nogemm.export.folder import RECORD

Streamer = Callable[[Tensor], None]
_PRECISIONS = (None, "f32")


class OpenVINODecoder:
    """An exported decoder, compiled for this processor, with its memory of the tokens so far.

    Args:
        folder: written by `nogemm.export_decoder`.
        threads: of OpenVINO; 0: its own choice.
        precision: None: what OpenVINO prefers here; "f32" switches its own rounding of states, keys and values off.
    Raises:
        CheckpointError: the folder holds no exported decoder, or a damaged one.
        ConfigError: an argument is out of range.
        NativeError: openvino is not installed.

    Attributes:
        record: what `DecoderExportReport` says of the export.
    """

    def __init__(self, folder: str | Path, *, threads: int = 0, precision: str | None = None) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
            raise ConfigError(f"OpenVINODecoder: threads must be an integer of at least 0, got {threads!r}")
        if precision not in _PRECISIONS:
            raise ConfigError(f"OpenVINODecoder: precision must be None or 'f32', got {precision!r}")
        self.record = read_record(Path(folder))
        host.check_installed()
        root = Path(folder)
        try:
            graph = host.load(root / self.record["model"], root / self.record["extension"])
            self.exact = self.record["head"] == "exact"
            dg.keep_outputs(graph, (dg.TOKEN, dg.EXACT) if self.exact else (dg.LOGITS,))
            self._request = dg.compile_graph(graph, threads, precision).create_infer_request()
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: OpenVINO cannot run this decoder: {error}") from error
        # Tokens [B, L] whose keys and values the memory holds, and their mask.
        self._held: tuple[Tensor, Tensor | None] | None = None

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 20,
        *,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        streamer: Streamer | None = None,
        report: GenerationReport | None = None,
    ) -> Tensor:
        """Continue prompts greedily: each token is the argmax of the head's logits, ties to the lowest index.

        A prompt that begins with all tokens that the memory holds, such as what a former call was given and returned
        before it was interrupted, goes on from there; any other begins anew.

        Args:
            input_ids: int64 [B, L], L at least 1; shorter prompts are padded on the left, with `attention_mask` 0.
            max_new_tokens: N, at least 0.
            eos_token_id: ends a sequence, which is then padded with it; None: what the model names. [] never ends.
            streamer: called with the new tokens [B] of every step.
            report: filled in.
        Returns:
            int64 [B, L + N] at most: prompts and new tokens.
        Raises:
            ConfigError: an argument is out of range, or prompt and N do not fit the model's positions.
            NotFiniteError: a state or a logit is NaN or infinite; no token is made up.
        Cost: per token the body's matrices and the head's codes, see `DecoderExportReport.bytes_per_token`.
        """
        self._check(input_ids, attention_mask, max_new_tokens)
        named = self.record["ends"] if eos_token_id is None else eos_token_id
        ends = torch.tensor([named] if isinstance(named, int) else list(named), dtype=torch.int64)
        report = GenerationReport() if report is None else report
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.long()
        ids = input_ids.long()
        done = torch.zeros(len(ids), dtype=torch.bool)
        start = time.perf_counter()
        for place in range(max_new_tokens):
            token = self._next(ids, mask, report)
            token = torch.where(done, ends[0] if len(ends) else 0, token)
            report.tokens += int((~done).sum())
            done |= torch.isin(token, ends)
            ids = torch.cat((ids, token.unsqueeze(1)), 1)
            if mask is not None:
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            now = time.perf_counter()
            if place == 0:
                report.prompt_seconds, start = now - start, now
            report.seconds = now - start
            if streamer is not None:
                streamer(token)
            if bool(done.all()):
                break
        return ids

    def _next(self, ids_BL: Tensor, mask_BL: Tensor | None, report: GenerationReport) -> Tensor:
        """Run the tokens that the memory does not hold; return the next of each sequence, [B]."""
        held, seen = (None, None) if self._held is None else self._held
        goes_on = held is not None and _begins(ids_BL, held) and held.shape[1] < ids_BL.shape[1]
        if goes_on and (seen is not None or mask_BL is not None):
            goes_on = seen is not None and mask_BL is not None and _begins(mask_BL, seen)
        fresh = ids_BL[:, held.shape[1] :] if held is not None and goes_on else ids_BL
        if not goes_on:
            self._request.reset_state()
        self._held = None  # an interrupt between here and the end leaves a memory that nobody knows
        found = step(self._request, fresh, ids_BL.shape[1], mask_BL)
        if self.exact:
            token = torch.from_numpy(found[dg.TOKEN][:, -1].astype(np.int64))
            rows = found[dg.EXACT][:, -1].tolist()
        else:
            logits = found[dg.LOGITS][:, -1]
            best = logits.argmax(1)  # a NaN, if there is one
            token = torch.from_numpy(np.where(np.isfinite(logits[np.arange(len(best)), best]), best, -1))
            rows = [logits.shape[1]] * len(logits)
        if int(token.min()) < 0:
            place = int((token < 0).int().argmax())
            raise NotFiniteError(
                f"the state of sequence {place} at position {ids_BL.shape[1] - 1} is not finite: it has no most likely "
                "token"
            )
        report.rows += rows
        self._held = ids_BL, mask_BL
        return token

    def _check(self, ids: Tensor, mask: Tensor | None, count: int) -> None:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or len(ids) < 1:
            given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ConfigError(f"generate: input_ids must be a tensor int64 [B, L], got {given}")
        if ids.shape[1] < 1:
            raise ConfigError("generate: the prompt is empty; give at least the token that begins a text")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"generate: max_new_tokens must be an integer of at least 0, got {count!r}")
        rows, limit = self.record["vocabulary"], self.record["positions"]
        if int(ids.min()) < 0 or int(ids.max()) >= rows:
            raise ConfigError(
                f"generate: input_ids must be from 0 to {rows - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        if limit and ids.shape[1] + count > limit:
            raise ConfigError(
                f"generate: {ids.shape[1]} tokens and max_new_tokens={count} are more than the model's {limit} "
                "positions"
            )
        if mask is None:
            return
        ones = mask.shape == ids.shape and bool(((mask == 0) | (mask == 1)).all()) and bool((mask[:, -1] == 1).all())
        if not ones or bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ConfigError(
                "generate: attention_mask must be like input_ids, 0 for the padding on the left and then 1"
            )


def _begins(whole_BL: Tensor, start_BL: Tensor) -> bool:
    """Say whether each row begins with a row of `start_BL`."""
    return whole_BL.shape[0] == start_BL.shape[0] and torch.equal(whole_BL[:, : start_BL.shape[1]], start_BL)


def read_record(folder: Path) -> dict[str, Any]:
    """Return what an export says of itself.

    Raises:
        CheckpointError: there is no exported decoder, or a file of it is missing.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        names = [record["model"], str(Path(record["model"]).with_suffix(".bin")), record["extension"]]
        needed = {key: record[key] for key in ("head", "vocabulary", "positions", "ends")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no decoder that nogemm.export_decoder has written ({error})") from error
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {', '.join(absent)} is missing")
    return {**record, **needed}
