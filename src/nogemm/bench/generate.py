"""`nogemm bench generate`: a whole decoder, exported with an exact head, beside the engines that people use instead.

Every engine has the weights of one model, in its own precision, and its own dense head. Perplexity is of a text that
nothing was fitted to. A call continues a fresh prompt greedily, the prompt included.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nogemm.bench.contenders.generate import perplexity
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan, Spec, add_ratios, measure
from nogemm.bench.engine.result import origin
from nogemm.convert.head import convert_head
from nogemm.errors import ConfigError, NogemmError
from nogemm.export import export_decoder
from nogemm.export.running import decoder_record
from nogemm.hardware.cpu import usable_cores
from nogemm.models.loading import is_gguf, load_model, load_tokenizer
from nogemm.running.measured import Keep, Note

OURS = "nogemm-openvino-int4"
CONTENDERS = (
    OURS,
    "nogemm-openvino-int8",
    "nogemm-openvino-deferred-int4",
    "nogemm-openvino-deferred-int8",
    "nogemm-genai-int4",
    "openvino-int4",
    "openvino-int8",
    "openvino-genai-int4",
    "openvino-genai-int8",
    "llama.cpp-given",
    "llama.cpp-q8_0",
    "onnxruntime-genai-int4",
    "torch-bf16",
    "nogemm-exact-bf16",
    "nogemm-deferred-bf16",
    "torch-body8",
    "nogemm-deferred-body8",
    "torch-sampled-bf16",
    "nogemm-deferred-sampled-bf16",
    "torch-fp32",
    "nogemm-deferred-fp32",
    "nogemm-high_recall-fp32",
    "torchao-int8",
)
_PACKAGES = {
    "nogemm-genai": ("openvino_genai", "openvino_tokenizers"),
    "openvino-genai": ("openvino_genai", "openvino_tokenizers"),
    "llama.cpp": ("llama_cpp",),
    "onnxruntime-genai": ("onnxruntime_genai",),
    "torchao": ("torchao",),
}
_FACTORY = "nogemm.bench.contenders.generate:GenerateContender"
_VERSIONS = ("openvino", "openvino-genai", "nncf", "llama-cpp-python", "onnxruntime-genai", "torchao", "transformers")


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Say what is generated.

    Attributes:
        model: a causal language model: directory, hub name or GGUF file.
        prompt, new_tokens: tokens of a prompt, and of its continuation.
        text: tokens that perplexity is taken on.
        against: contenders, of `CONTENDERS`.
        folder: where exports are kept and found again; None: made anew in a temporary one.
        threads, rounds, seconds: as in `nogemm bench layer`.
    """

    model: str
    prompt: int = 16
    new_tokens: int = 64
    text: int = 384
    against: tuple[str, ...] = CONTENDERS
    folder: str | None = None
    threads: int = 0
    rounds: int = MIN_ROUNDS
    seconds: float = 0.5


def run_generate_bench(
    args: GenerateArgs, texts: Iterable[str], *, note: Note | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Measure tokens a second and perplexity; return a result whose rows have a time for 1 call of N tokens.

    Raises:
        ConfigError: an unknown contender, too few texts.
        NogemmError: an export failed.
    """
    say: Note = note or (lambda line: None)
    if unknown := sorted(set(args.against) - set(CONTENDERS)):
        raise ConfigError(f"--against {unknown[0]!r}: choose from {', '.join(CONTENDERS)}")
    for name in ("prompt", "new_tokens", "text"):
        if getattr(args, name) < 2:
            raise ConfigError(f"bench generate: {name} must be at least 2, got {getattr(args, name)}")
    threads = args.threads or usable_cores()
    head = origin(asdict(args) | {"model": Path(args.model).name, "folder": None, "threads": threads})
    head["engines"] = {name: found for name in _VERSIONS if (found := _version(name))}
    with _folder(args.folder) as folder:
        tokens = _Tokens(args, iter(texts))
        inputs = {"prompts": tokens.prompts(64), "text": tokens.text, "reference": None}
        made = _Models(args.model, folder, tokens, say)
        inputs["reference"] = head["perplexity_fp32"] = made.reference()
        specs = [_spec(name, made, inputs) for name in args.against]
        made.forget()
        plan = Plan(threads=threads, rounds=args.rounds, seconds=args.seconds, max_calls=3)
        cases = [{"batch": 1, "length": args.prompt, "new_tokens": args.new_tokens}]

        def finished(rows: list[Any]) -> dict[str, Any]:
            add_ratios(rows, args.against[0], ("batch",))
            for row in rows:
                if row.get("us_median"):
                    row["tokens_per_second"] = 1e6 * args.new_tokens / row["us_median"]
            return head | {"rows": rows}

        kept = None if keep is None else lambda rows: keep(finished(rows))
        return finished(measure(specs, cases, plan, note=note, keep=kept))


class _Tokens:
    """Token ids of texts: those in front fit codes, the ones behind them are read and continued."""

    def __init__(self, args: GenerateArgs, texts: Iterator[str]) -> None:
        self.tokenizer = load_tokenizer(args.model)
        self.length = args.prompt
        self.fitting = list(islice(texts, 64))
        first = self.tokenizer.bos_token_id
        self.text = [] if first is None else [first]
        while len(self.text) < args.text and (text := next(texts, None)) is not None:
            self.text += self.tokenizer(text + "\n", add_special_tokens=False).input_ids
        self.rest: list[int] = []
        for text in texts:
            self.rest += self.tokenizer(text, add_special_tokens=False).input_ids
            if len(self.rest) >= 64 * args.prompt:
                break
        if len(self.text) < args.text or len(self.rest) < 2 * args.prompt:
            raise ConfigError("--data: the texts are too few for --text and the prompts")
        self.text = self.text[: args.text]

    def prompts(self, count: int) -> list[list[int]]:
        parts = [self.rest[i : i + self.length] for i in range(0, len(self.rest) - self.length, self.length)]
        return parts[:count]


class _Models:
    """Makes what the engines load, once each."""

    def __init__(self, model: str, folder: Path, tokens: _Tokens, say: Callable[[str], None]) -> None:
        self.name, self.folder, self.tokens, self.say = model, folder, tokens, say
        self.dense: Any = None
        self.exact: Any = None

    def reference(self) -> float:
        """Return float32's perplexity."""
        with torch.inference_mode():
            ids = torch.tensor([self.tokens.text])
            return perplexity(self._dense()(input_ids=ids, use_cache=False).logits[0].float(), self.tokens.text)

    def forget(self) -> None:
        """Let go of the torch models."""
        self.dense = self.exact = None

    def exported(self, head: str, body: str) -> Path:
        """Return an export; the dense one has an int8 head, as NNCF gives it to either body."""
        target = self.folder / f"{head}-{body}"
        rows = "fp16" if head == "exact" else "int8"
        with contextlib.suppress(NogemmError):
            record = decoder_record(target)
            if (record["head"], record["body"], record["rows"]) == (head, body, rows):
                return target
        self.say(f"exporting {head} head, {body} body")
        model = self._exact() if head == "exact" else self._dense()
        export_decoder(model, target, body=body, rows=rows, tokenizer=self.tokens.tokenizer)
        return target

    def q8_0(self) -> Path:
        """Return the model as llama.cpp's Q8_0, made from the given file."""
        target = self.folder / "q8_0.gguf"
        if not target.exists():
            import llama_cpp  # pyright: ignore[reportMissingImports]

            self.say("quantising to Q8_0")
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
            silent = llama_cpp.llama_log_callback(lambda *line: None)
            llama_cpp.llama_log_set(silent, None)
            code = llama_cpp.llama_model_quantize(self.name.encode(), str(target).encode(), params)
            if code != 0:
                raise NogemmError(f"llama.cpp could not make {target.name} (code {code})")
        return target

    def onnx(self) -> Path:
        """Return the model as ONNX Runtime GenAI's own builder writes it in int4."""
        target = self.folder / "onnx-int4"
        if not (target / "genai_config.json").exists():
            self.say("building ONNX int4")
            source = self.folder / "torch"
            self._dense().save_pretrained(source)
            self.tokens.tokenizer.save_pretrained(source)
            words = ["-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
            command = [sys.executable, *words, "-p", "int4", "-e", "cpu", "-c", str(self.folder / "cache")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0 or not (target / "genai_config.json").exists():
                said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
                raise NogemmError(f"onnxruntime-genai's model builder failed: {said[-1]}")
        return target

    def _dense(self) -> Any:
        if self.dense is None:
            self.dense = load_model(self.name, dtype=torch.float32)
        return self.dense

    def _exact(self) -> Any:
        if self.exact is None:
            self.exact = load_model(self.name, dtype=torch.float32)
            convert_head(self.exact, data=self.tokens.fitting, tokenizer=self.tokens.tokenizer)
        return self.exact


def _spec(name: str, made: _Models, inputs: dict[str, Any]) -> Spec:
    """Make a contender's files; a contender that cannot run says why."""
    family, _, precision = name.rpartition("-")
    absent = [package for package in _PACKAGES.get(family, ()) if importlib.util.find_spec(package) is None]
    if absent:
        said = f"{', '.join(absent)} not installed: pip install 'nogemm[generate-peers]'"
        return Spec(name=name, factory=_FACTORY, missing=said)
    try:
        return Spec(name=name, factory=_FACTORY, settings=inputs | _settings(family, precision, made))
    except (NogemmError, OSError) as error:
        return Spec(name=name, factory=_FACTORY, missing=str(error))


def _settings(family: str, precision: str, made: _Models) -> dict[str, Any]:
    if family in ("nogemm-openvino", "nogemm-openvino-deferred", "nogemm-genai"):
        engine, mode = "genai" if "genai" in family else "openvino", "deferred" if "deferred" in family else "exact"
        return {"engine": engine, "mode": mode, "folder": str(made.exported("exact", precision))}
    if family in ("openvino", "openvino-genai"):
        engine = "genai" if "genai" in family else "openvino"
        return {"engine": engine, "folder": str(made.exported("dense", precision))}
    if family == "llama.cpp":
        if not is_gguf(made.name):
            raise ConfigError("llama.cpp reads GGUF files; give one as the model")
        return {"engine": "llama.cpp", "file": str(made.q8_0() if precision == "q8_0" else made.name)}
    if family == "onnxruntime-genai":
        return {"engine": "onnxruntime", "folder": str(made.onnx())}
    family, sampled = family.removesuffix("-sampled"), family.endswith("-sampled")
    settings = {"engine": "torch", "model": made.name, "precision": precision, "sampled": sampled}
    if family.startswith("nogemm-"):
        return settings | {"engine": "hire", "mode": family.removeprefix("nogemm-"), "fit": made.tokens.fitting}
    return settings


@contextlib.contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="nogemm-bench-") as folder:
        yield Path(folder)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
