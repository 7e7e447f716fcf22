"""`nogemm generate`: continue a text with a decoder, by a head that is converted, or is now."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, Trust
from nogemm.cli.models import fit_head, head_config_of
from nogemm.cli.options import refuse
from nogemm.errors import ConfigError
from nogemm.running.measured import end_early
from nogemm.running.partial import Record

DEFAULT_TEXTS = 64
"""Packaged texts that the codes of a dense head are fitted to where none are named."""
_OF_SAMPLES = ("temperature", "top_k", "top_p", "seed")


def generate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A decoder: directory, name in the local cache, or GGUF file.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 100,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            help="exact, deferred (proven sixteen at a time), high_recall or fast [deferred; of a converted head: its "
            "own]."
        ),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End behind this string; may be given again.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the most likely.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Of --sample [of the model's generation config, or else 1].")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Of --sample: only the k most likely; 0: all [of the config, or else all].")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Of --sample: only the most likely with this share; 1: all [of the config, or else all]."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of --sample: the same seed, the same text.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Texts that a dense head's codes are fitted to: a file, or `sample` [64 packaged texts]."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: fp32 or bf16; default: as stored.")] = None,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Continue a text with the largest logits of MODEL, or with tokens drawn from them: those of the dense head.

    Penalties and forced tokens of the model's generation config are applied, and need all logits. Ctrl-C ends the text;
    what was generated is reported, and written to --json.
    """
    import torch

    import nogemm
    from nogemm.models.loading import load_model, load_tokenizer

    kinds = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"--dtype must be fp32 or bf16, got {dtype!r}")
    if mode is not None:
        head_config_of(mode, "--mode")
    if not sample:
        refuse(context, _OF_SAMPLES, "needs --sample")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    ids = _prompt(tokenizer, prompt, chat)
    loaded = load_model(model, dtype=kinds[dtype], trust_remote_code=trust_remote_code)
    head = _head(loaded, tokenizer, model, mode, data)
    nogemm.pack(loaded)
    sampling = {"do_sample": sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    call = {"stop_strings": stop, "tokenizer": tokenizer, **sampling}
    _Run(head, tokenizer, json)(loaded, ids, max_new_tokens, call)


def _head(model: Any, tokenizer: Any, name: str, mode: str | None, data: str | None) -> Any:
    """Return the model's head: the converted one in the mode asked for, or a dense one converted now."""
    from dataclasses import replace

    from nogemm.convert.head import find_head

    head = find_head(model)
    if head is None:
        config = head_config_of(mode or "deferred", "--mode")
        if data is not None:
            return fit_head(model, config, data, tokenizer)
        return fit_head(model, config, "sample", tokenizer, DEFAULT_TEXTS)
    if data is not None:
        raise ConfigError(f"--data: the head of {name} is converted already, its codes are fitted")
    if mode == "high_recall" and head.config.mode != mode:
        raise ConfigError(
            f"--mode high_recall: the rows of that mode are chosen when a head is converted, and the head of {name} "
            f"was converted in mode {head.config.mode}; convert the model anew by nogemm convert --head high_recall"
        )
    if mode is not None:
        head.config = replace(head.config, mode=mode)
    return head


class _Run:
    """One generation: its text on the way, its figures at the end, however it ends."""

    def __init__(self, head: Any, tokenizer: Any, json: Any) -> None:
        from nogemm.decoding import GenerationReport

        self.head, self.report, self.shown = head, GenerationReport(), _Text(tokenizer)
        self.record = Record(json, "generate")
        self.steps = 0

    def __call__(self, model: Any, ids: Any, count: int, call: dict[str, Any]) -> None:
        import nogemm

        self.prompt = int(ids.shape[1])
        call |= {"streamer": self.shown.add, "draft_streamer": self._step, "report": self.report}
        try:
            nogemm.generate(model, ids, count, **call)
        except KeyboardInterrupt as stop:
            self.shown.end()
            self.record.keep(self._result())
            end_early(self.record, stop, self._show)
        except Exception as error:
            if self.report.tokens:
                self.shown.end()
                self.record.keep(self._result())
                self.record.stopped(error)
            raise
        self.shown.end()
        result = self._result()
        self._show(result)
        self.record.done(result)

    def _step(self, token: Any) -> None:
        self.steps += 1

    def _result(self) -> dict[str, Any]:
        """Return the figures; rows of a search and of a proof are means over states, None where there was none."""
        report, config, rows = self.report, self.head.config, self.report.rows
        each = self.head.searched_rows
        searches = 0 if config.mode == "exact" else min(self.steps, len(rows))  # a call of the draft streamer each
        proofs = len(rows) - searches
        return {
            "text": self.shown.text,
            "tokens": report.tokens,
            "mode": config.mode,
            "search_rows": each if searches else None,
            "proof_rows": (sum(rows) - searches * each) / proofs if proofs else None,
            "proofs": report.proofs,
            "differences": report.differences,
            "tokens_per_second": report.tokens_per_second,
            "prompt_seconds": report.prompt_seconds,
        }

    def _show(self, result: dict[str, Any]) -> None:
        said = [
            f"{result[name]:,.0f} of {self.head.out_features:,} rows of the head computed by {what}"
            for name, what in (("search_rows", "a search"), ("proof_rows", "the proof of a token"))
            if result[name] is not None
        ]
        if result["proofs"]:
            said.append(f"{result['differences']} of {result['proofs']} proofs found another token")
        speed = f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} a second after the first"
        prompt = f"prompt of {self.prompt} in {result['prompt_seconds']:.2f} s"
        print("; ".join([f"{speed}, {prompt}", *said]), file=sys.stderr)


def _prompt(tokenizer: Any, text: str, chat: bool) -> Any:
    if not text:
        raise ConfigError("--prompt is empty")
    if not chat:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("--chat: the model's tokenizer has no chat template")
    message = [{"role": "user", "content": text}]
    made = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return made["input_ids"]


class _Text:
    """Prints a text as its tokens come: words whose bytes are complete."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.tokens, self.text = tokenizer, [], ""

    def add(self, token: Any) -> None:
        self.tokens.append(int(token[0]))
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self.text) :], end="", flush=True)
            self.text = text

    def end(self) -> None:
        print(flush=True)
