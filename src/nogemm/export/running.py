"""Run an exported decoder in plain OpenVINO: our own loop over the memory that the graph keeps.

Legend: B sequences, L tokens of the prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nogemm.decoding.checks import check_prompt
from nogemm.decoding.ending import Ending
from nogemm.decoding.sampling import make_sampling
from nogemm.decoding.streaming import Streamer, check_streamers, streamed
from nogemm.decoding.windows import GenerationReport, Windows
from nogemm.errors import CheckpointError, ConfigError
from nogemm.export import decoder_graph as dg
from nogemm.export import openvino_host as host
from nogemm.export.folder import read_record
from nogemm.export.memory import Memory
from nogemm.export.steps import HostHead, HostSteps

MODES = ("exact", "deferred")
_PRECISIONS = (None, "f32")


class OpenVINODecoder:
    """An exported decoder, compiled for this processor, with its memory of the tokens so far.

    Args:
        folder: written by `nogemm.export_decoder`.
        threads: of OpenVINO; 0: its own choice.
        precision: None: what OpenVINO prefers here, keys and values in 16 bits; "f32" switches its own rounding of
            states, keys and values off.
        mode: "exact": each token is proven as it is chosen; "deferred": tokens are searched for, and proven some at a
            time. The tokens are the same. None: the mode that the head had when it was exported.
    Raises:
        CheckpointError: the folder holds no exported decoder, or a damaged one.
        ConfigError: an argument is out of range, or `mode` is one that the export cannot run in.
        NativeError: openvino is not installed.

    Attributes:
        record: what `DecoderExportReport` says of the export.
        exact: whether the head is our operator; else it is dense.
        mode: how tokens are chosen; None: from all logits of a dense head.
        bytes_per_token: weights that one token reads in this mode.
    """

    def __init__(
        self, folder: str | Path, *, threads: int = 0, precision: str | None = None, mode: str | None = None
    ) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
            raise ConfigError(f"OpenVINODecoder: threads must be an integer of at least 0, got {threads!r}")
        if precision not in _PRECISIONS:
            raise ConfigError(f"OpenVINODecoder: precision must be None or 'f32', got {precision!r}")
        self.record = decoder_record(Path(folder))
        self.exact = self.record["head"] == "exact"
        self.mode = _mode(self.record, self.exact, mode)
        self.bytes_per_token = self.record["bytes_per_token"]
        if self.mode == "deferred":
            self.bytes_per_token += self.record["deferred_head_bytes_per_token"] - self.record["head_bytes_per_token"]
        host.check_installed()
        try:
            self._head, request = self._compile(Path(folder), threads, precision)
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: OpenVINO cannot run this decoder: {error}") from error
        self._memory = Memory(request)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 20,
        *,
        do_sample: bool = False,
        temperature: float | None = None,
        seed: int | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | Tensor | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        streamer: Streamer | None = None,
        draft_streamer: Callable[[Tensor], None] | None = None,
        report: GenerationReport | None = None,
    ) -> Tensor:
        """Continue prompts. Greedy tokens are the argmax of the head's logits, ties to the lowest index; sampled ones

            token = argmax_v  logit[v] + temperature noise[v]

        with Gumbel noise that seed, place in the text and sequence fix. In mode "deferred" tokens are searched for and
        proven some at a time: the memory goes back to the first one that differs, so the text is the same. An export
        knows no generation config but the tokens that end a text: penalties and forced tokens are not applied.

        A prompt that begins with all tokens that the memory holds, such as what a former call was given and returned
        before it was interrupted, goes on from there; any other begins anew.

        Args:
            input_ids: int64 [B, L], L at least 1; shorter prompts are padded on the left, with `attention_mask` 0.
            max_new_tokens: N, at least 0.
            temperature: only with `do_sample`; None: 1.
            seed: of the noise, only with `do_sample`; None: drawn from torch's generator.
            eos_token_id: ends a sequence, which is then padded with it; None: what the model names. [] never ends.
            stop_strings: end a sequence behind the token that completes one of them in its new text; need `tokenizer`.
            streamer: called with the new tokens [B] of every step, once they stay; or a streamer of transformers.
            draft_streamer: called with tokens at once; searched ones from one that differs on are in vain.
            report: filled in.
        Returns:
            int64 [B, L + N] at most: prompts and new tokens.
        Raises:
            ConfigError: an argument is out of range, prompt and N do not fit the model's positions, or a sample is
                asked of an exact head whose logits the model caps, or of an export that is older than sampling.
            NotFiniteError: a state or a logit is NaN or infinite; no token is made up.
        Cost: per token the body's matrices and what the head reads, see `bytes_per_token`; per token that a proof finds
            different, two copies of keys and values, and the steps behind it.
        """
        rows = self.record["vocabulary"]
        mask = check_prompt(input_ids, attention_mask, max_new_tokens, rows, self.record["positions"])
        if do_sample:
            self._check_sampling()
        sampling = make_sampling(do_sample, temperature=temperature, top_k=None, top_p=None, seed=seed)
        check_streamers(streamer, draft_streamer)
        ends = self.record["ends"] if eos_token_id is None else eos_token_id
        ending = Ending(None, ends, None, stop_strings, tokenizer, rows)
        report = GenerationReport() if report is None else report
        if max_new_tokens == 0:
            with streamed(streamer, input_ids):
                return input_ids.clone()
        ids = input_ids.long()
        self._memory.begin(ids, mask)
        steps = HostSteps(self._memory, self._head, sampling)
        return Windows(steps, ending, ids, mask, max_new_tokens, draft_streamer, report).all(streamer)

    def _compile(self, root: Path, threads: int, precision: str | None) -> tuple[HostHead, Any]:
        """Return the head as this mode runs it, and a request of the whole decoder."""
        record = self.record
        graph = host.load(root / record["model"], root / record["extension"])
        proof, newer = None, _is_newer(record)
        choices: dict[str, Any] = {"exact": self.exact, "vocabulary": record["vocabulary"]}
        if not self.exact or not newer:
            dg.keep_outputs(graph, (dg.TOKEN, dg.EXACT) if self.exact else (dg.LOGITS,))
        else:
            choices |= {"noise": True, "scale": record["scale"]}
            factory = dg.Factory(root / record["extension"])
            if self.mode == "deferred":
                proof = dg.compile_graph(dg.proof_graph(graph, factory), threads, "f32").create_infer_request()
                choices |= {"best": record["search_rows"], "every": record["verify_every"], "proof": proof}
            graph = dg.choose_tokens(graph, factory, choices.get("best", 0))
        request = dg.compile_graph(graph, threads, precision).create_infer_request()
        return HostHead(**choices), request

    def _check_sampling(self) -> None:
        if not self.exact:
            return
        if not _is_newer(self.record):
            raise ConfigError("generate: do_sample needs a newer export of this model; export it again")
        if self.record["cap"] is not None:
            raise ConfigError(
                "generate: the model caps its logits, and do_sample then needs them all; export it with a dense head, "
                "or use nogemm.generate"
            )


def _is_newer(record: dict[str, Any]) -> bool:
    """Say whether an export knows of modes; its operators then search and take noise, too."""
    return "mode" in record


def _mode(record: dict[str, Any], exact: bool, asked: str | None) -> str | None:
    if asked not in (None, *MODES):
        raise ConfigError(f"OpenVINODecoder: mode must be one of {', '.join(MODES)}, got {asked!r}")
    if not exact:
        if asked is not None:
            raise ConfigError(f"OpenVINODecoder: mode={asked!r} needs a converted head; this export has a dense one")
        return None
    if asked == "deferred" and not _is_newer(record):
        raise ConfigError("OpenVINODecoder: mode='deferred' needs a newer export of this model; export it again")
    return asked or record.get("mode", "exact")


def decoder_record(folder: Path) -> dict[str, Any]:
    """Return what the export of a decoder says of itself, as `read_record` does.

    Raises:
        CheckpointError: there is no exported decoder, or it is not whole.
    """
    record = read_record(folder)
    if absent := {"head", "vocabulary", "positions", "ends"} - record.keys():
        raise CheckpointError(
            f"{folder}: no decoder that nogemm.export_decoder has written (its record has no {min(absent)})"
        )
    return record
