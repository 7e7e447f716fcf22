"""`nogemm generate`: continue a text with a decoder, by a head that is converted, or is now."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, Trust, finish
from nogemm.errors import ConfigError


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A decoder: directory, name in the local cache, or GGUF file.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 100,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    mode: Annotated[
        str, typer.Option(help="Of a dense head: exact, deferred (proven sixteen at a time), high_recall or fast.")
    ] = "deferred",
    stop: Annotated[list[str] | None, typer.Option(help="End behind this string; may be given again.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the most likely.")] = False,
    temperature: Annotated[float, typer.Option(help="Of --sample.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Of --sample: only the k most likely.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of --sample: only the most likely with this share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of --sample: the same seed, the same text.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Texts that a dense head's codes are fitted to: a file, or `sample`.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: fp32 or bf16; default: as stored.")] = None,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Continue a text with the largest logits of MODEL, or with tokens drawn from them: those of the dense head.

    Penalties and forced tokens of the model's generation config are not applied.
    """
    import torch

    import nogemm
    from nogemm.convert.head import find_head
    from nogemm.decoding import GenerationReport
    from nogemm.models.loading import load_model, load_tokenizer
    from nogemm.train.sources import texts

    kinds = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"--dtype must be fp32 or bf16, got {dtype!r}")
    if not sample and any(value is not None for value in (top_k, top_p, seed)):
        raise ConfigError("--top-k, --top-p and --seed need --sample")
    loaded = load_model(model, dtype=kinds[dtype], trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    head = find_head(loaded)
    if head is None:
        config = nogemm.HeadConfig(mode=mode)  # type: ignore[arg-type]
        head = nogemm.convert_head(loaded, config, data=None if data is None else texts(data), tokenizer=tokenizer)
    elif data is not None:
        raise ConfigError(f"--data: the head of {model} is converted already, its codes are fitted")
    nogemm.pack(loaded)
    ids = _prompt(tokenizer, prompt, chat)
    shown = _Text(tokenizer)
    report = GenerationReport()
    try:
        nogemm.generate(
            loaded,
            ids,
            max_new_tokens,
            do_sample=sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_strings=stop,
            tokenizer=tokenizer,
            streamer=shown.add,
            report=report,
        )
    finally:
        shown.end()
    rows = sum(report.rows) / max(1, report.tokens)
    print(
        f"{report.tokens} tokens, {report.tokens_per_second:.1f} a second after the first, prompt of {ids.shape[1]} in "
        f"{report.prompt_seconds:.2f} s; {rows:,.0f} of {head.out_features:,} rows of the head computed a token"
        + (f", {report.differences} of {report.proofs} proofs found another token" if report.proofs else ""),
        file=sys.stderr,
    )
    result = {"kind": "generate", "text": shown.text, "tokens": report.tokens, "rows": rows}
    finish(result | {"tokens_per_second": report.tokens_per_second, "prompt_seconds": report.prompt_seconds}, json)


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
