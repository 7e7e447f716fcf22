"""The worker's side of `nogemm bench generate`: engines that continue a prompt greedily, with their caches.

An engine takes token ids and gives token ids. Before its clock starts it reads a text that no training saw, and its
perplexity says whether it computes the model: a broken engine's is hundreds.

Legend: L tokens of a prompt, N new tokens, S tokens of a text, V vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogemm.convert.body import round_body
from nogemm.convert.head import convert_head
from nogemm.decoding import generate
from nogemm.decoding.caches import new_cache
from nogemm.decoding.sampling import Sampling
from nogemm.decoding.states import Decoder
from nogemm.export import OpenVINODecoder
from nogemm.export import decoder_graph as dg
from nogemm.export.memory import step
from nogemm.export.openvino_host import load
from nogemm.heads import HeadConfig, deferred_bytes, searched_bytes
from nogemm.models.loading import load_model, load_tokenizer
from nogemm.ops import head_logits

SEED = 1  # of the noise that sampled tokens are drawn by
MOST_OTHER = 0.1  # share of the tokens that may differ where nothing is proven
NEAR = 1.0  # nats that the logit of a token may lie behind the best, where keys and values are rounded otherwise
WORSE = 1.5  # a perplexity further above float32's is no longer called the same model


class Engine:
    """What all engines share.

    Attributes:
        bytes_read: weights that one token reads.
    """

    bytes_read = 0.0

    def generate(self, ids_L: list[int], count: int) -> list[int]:
        """Continue a prompt by `count` tokens, greedily, whatever they are."""
        raise NotImplementedError

    def logits(self, ids_S: list[int]) -> Tensor:
        """Return all logits behind each token of a text, [S, V]."""
        raise NotImplementedError

    def verify(self) -> dict[str, Any]:
        """Return what is known of the engine's tokens; "error" if they are not what they should be."""
        return {}


class Torch(Engine):
    """transformers, in eager mode; sampled tokens are drawn from all logits by the noise of `nogemm.generate`.

    Precision "body8": the head in bfloat16 and every other matrix in int8, by `Int8Linear`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers import GenerationConfig

        precision = settings["precision"]
        self.sampling = Sampling(1.0, None, None, SEED) if settings.get("sampled") else None
        self.model: Any = load_model(settings["model"], dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
        self.model.generation_config = GenerationConfig()  # penalties that it may name are not what is measured
        if precision == "int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

            head = self.model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())  # the embedding stays as it is
            quantize_(self.model, Int8WeightOnlyConfig())
        item = {"fp32": 4, "bf16": 2, "body8": 2, "int8": 1}[precision]
        linear = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, torch.nn.Linear))
        self.bytes_read = float(item * linear)
        if precision == "body8":
            round_body(self.model, keep=False)
            head = self.model.get_output_embeddings().weight.numel()
            self.bytes_read = float(linear + head)  # a byte a number, and two of the head's

    def generate(self, ids_L: list[int], count: int) -> list[int]:
        cache, fresh, made = new_cache(self.model), torch.tensor([ids_L]), []
        for _ in range(count):
            logits = self.model(input_ids=fresh, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if self.sampling is None:
                fresh = logits.argmax(-1, keepdim=True)
            else:
                fresh = self.sampling.draw(logits.float(), [len(ids_L) + len(made)], [0]).view(1, 1)
            made.append(int(fresh))
        return made

    def logits(self, ids_S: list[int]) -> Tensor:
        return self.model(input_ids=torch.tensor([ids_S]), use_cache=False).logits[0].float()


class HireTorch(Torch):
    """transformers in eager mode with a converted head, in our own loop."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.config = config = HeadConfig(mode=settings["mode"])
        tokenizer = load_tokenizer(settings["model"])
        self.head = convert_head(self.model, config, settings["fit"], tokenizer=tokenizer)
        weight, codes = self.head.weight, self.head.codes()
        # Of the head's own config, in which "high_recall" has chosen its rows.
        read = {"exact": codes.bytes, "deferred": deferred_bytes(codes, weight, self.head.config)}
        own = read.get(config.mode, searched_bytes(codes, weight, self.head.config))
        self.bytes_read += own - weight.numel() * weight.element_size()

    def generate(self, ids_L: list[int], count: int) -> list[int]:
        return self._continued(torch.tensor([ids_L]), count)[0, len(ids_L) :].tolist()

    def _continued(self, ids_BL: Tensor, count: int) -> Tensor:
        sampled = self.sampling is not None
        return generate(self.model, ids_BL, count, do_sample=sampled, seed=SEED if sampled else None, eos_token_id=[])

    def logits(self, ids_S: list[int]) -> Tensor:
        """Return the estimates of an approximate head, which stand for all logits there; else the model's own."""
        if not self.config.approximate:
            return super().logits(ids_S)
        ids = torch.tensor([ids_S])
        decoder = Decoder(self.model, self.head, ids)
        states_SD = decoder.base(input_ids=ids, use_cache=False).last_hidden_state[0].float()
        return decoder.scaling(torch.cat([self.head.estimate(x) for x in states_SD.split(16)]))

    def verify(self) -> dict[str, Any]:
        """Hold the tokens against all logits over the same states."""
        ids = torch.randint(0, self.head.out_features, (1, 8), generator=torch.Generator().manual_seed(0))
        positions = getattr(self.model.config, "max_position_embeddings", None) or 1024
        found = self._continued(ids, min(64, positions - 8))
        decoder, wrong, fresh = Decoder(self.model, self.head, ids), 0, ids
        for place, token in enumerate(found[0, 8:], 8):
            logits = decoder.scaling(self.head.logits(decoder.states(fresh)))
            own = logits.argmax(1) if self.sampling is None else self.sampling.draw(logits, [place], [0])
            wrong += int(own != token)
            fresh = token.view(1, 1)
        count = found.shape[1] - 8
        facts = {"proven_tokens": 0 if self.config.approximate else count, "other_tokens": wrong}
        most = MOST_OTHER * count if self.config.approximate else 0
        return facts if wrong <= most else facts | {"error": f"{wrong} of {count} tokens are not the dense head's"}


class OpenVINO(Engine):
    """An exported decoder in our own loop."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.folder, self.threads = Path(settings["folder"]), torch.get_num_threads()
        self.decoder = OpenVINODecoder(self.folder, threads=self.threads, mode=settings.get("mode"))
        self.bytes_read = float(self.decoder.bytes_per_token)

    def generate(self, ids_L: list[int], count: int) -> list[int]:
        found = self.decoder.generate(torch.tensor([ids_L]), count, eos_token_id=[])
        return found[0, len(ids_L) :].tolist()

    def logits(self, ids_S: list[int]) -> Tensor:
        return self._read(ids_S)[1]

    def verify(self) -> dict[str, Any]:
        """Hold the tokens of an exact head against all logits over the same states and rows."""
        if not self.decoder.exact:
            return {}
        record = self.decoder.record
        count = min(64, (record["positions"] or 1024) - 8)
        prompt = torch.randint(0, record["vocabulary"], (1, 8), generator=torch.Generator().manual_seed(0))
        made = self.decoder.generate(prompt, count, eos_token_id=[])
        if self.decoder.mode == "deferred":
            exact = OpenVINODecoder(self.folder, threads=self.threads, mode="exact")
            if not torch.equal(exact.generate(prompt, count, eos_token_id=[]), made):
                return {"error": "its tokens are not those of mode 'exact'"}
        ids = made[0].tolist()
        tokens, logits = self._read(ids[:-1])
        wrong = int((tokens != logits.argmax(1)).sum())
        facts = {"proven_tokens": len(tokens), "other_tokens": wrong}
        return facts if wrong <= 1 else facts | {"error": f"{wrong} of {len(tokens)} tokens are not the head's"}

    def _read(self, ids_S: list[int]) -> tuple[Tensor, Tensor]:
        """Read a text token by token; return the tokens chosen (where the head is exact) and all logits."""
        record = self.decoder.record
        graph = load(self.folder / record["model"], self.folder / record["extension"])
        wanted = (dg.STATE, dg.TOKEN) if self.decoder.exact else (dg.LOGITS,)
        dg.keep_outputs(graph, wanted)
        rows = _rows(graph, record) if self.decoder.exact else None
        request = dg.compile_graph(graph, self.threads).create_infer_request()
        tokens, kept = [], []
        for place, token in enumerate(ids_S):
            found = step(request, torch.tensor([[token]]), place + 1)
            kept.append(torch.from_numpy(found[wanted[0]][0, 0].copy()).float())
            tokens.append(int(found[dg.TOKEN][0, 0]) if self.decoder.exact else int(kept[-1].argmax()))
        stacked = torch.stack(kept)
        return torch.tensor(tokens), stacked if rows is None else _all_logits(stacked, rows)


class GenAI(OpenVINO):
    """An exported decoder in openvino-genai's pipeline.

    A dense export keeps keys and values as OpenVINO chooses, in eight bits, if its tokens are then near those of the
    same file in plain OpenVINO, else in 16; "keys_and_values" of its row says which.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import openvino_genai  # pyright: ignore[reportMissingImports]

        self.genai = openvino_genai
        self.pipe = self._pipe(sixteen=self.decoder.exact)

    def _pipe(self, *, sixteen: bool) -> Any:
        options: dict[str, Any] = {"ATTENTION_BACKEND": "SDPA", "INFERENCE_NUM_THREADS": self.threads}
        options["extensions"] = [str(self.folder / self.decoder.record["extension"])]
        if sixteen:
            options["KV_CACHE_PRECISION"] = dg.cache_precision()
        return self.genai.LLMPipeline(str(self.folder), "CPU", **options)

    def generate(self, ids_L: list[int], count: int) -> list[int]:
        import openvino

        ids = np.array([ids_L], np.int64)
        inputs = self.genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = self.genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        return list(self.pipe.generate(inputs, config).tokens[0])

    def verify(self) -> dict[str, Any]:
        """Hold the tokens against those of the same file in plain OpenVINO, or against its logits, along their way."""
        ids = list(range(5, 13))
        if self.decoder.exact:
            same = self.generate(ids, 32) == OpenVINO.generate(self, ids, 32)
            return {} if same else {"error": "its tokens are not those of the same file in plain OpenVINO"}
        for bits in (8, 16):
            made = self.generate(ids, 32)
            far = behind(self._read(ids + made[:-1])[1][len(ids) - 1 :], made)
            if far <= NEAR:
                return {"keys_and_values": f"{bits} bits"}
            if bits == 8:
                self.pipe = self._pipe(sixteen=True)
        return {"error": f"a token of its own is {far:.2f} nats behind plain OpenVINO's best"}


class LlamaCpp(Engine):
    """llama.cpp, by its Python package."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        threads = torch.get_num_threads()
        self.model = llama_cpp.Llama(
            settings["file"], n_ctx=1024, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False
        )
        self.file = settings["file"]
        self.bytes_read = float(Path(self.file).stat().st_size)

    def generate(self, ids_L: list[int], count: int) -> list[int]:
        self.model.reset()
        made, fresh = [], ids_L
        for _ in range(count):
            self.model.eval(fresh)
            fresh = [int(self._last().argmax())]
            made += fresh
        return made

    def logits(self, ids_S: list[int]) -> Tensor:
        self.model.reset()
        kept = []
        for token in ids_S:
            self.model.eval([token])
            kept.append(torch.from_numpy(self._last().copy()))
        return torch.stack(kept)

    def _last(self) -> np.ndarray:
        return np.ctypeslib.as_array(self.model._ctx.get_logits_ith(-1), (self.model.n_vocab(),))


class OnnxGenAI(Engine):
    """ONNX Runtime GenAI, a folder that its model builder has written."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import onnxruntime_genai  # pyright: ignore[reportMissingImports]

        self.og = onnxruntime_genai
        folder = Path(settings["folder"])
        config = json.loads((folder / "genai_config.json").read_text())
        options = config["model"]["decoder"]["session_options"]
        options["intra_op_num_threads"] = torch.get_num_threads()
        (folder / "genai_config.json").write_text(json.dumps(config))
        self.model = onnxruntime_genai.Model(str(folder))
        self.bytes_read = float(sum(file.stat().st_size for file in folder.glob("*.onnx*")))

    def generate(self, ids_L: list[int], count: int) -> list[int]:
        generator = self._generator(len(ids_L) + count)
        generator.append_tokens(np.array([ids_L], np.int32))
        made = []
        for _ in range(count):
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        return made

    def logits(self, ids_S: list[int]) -> Tensor:
        generator = self._generator(len(ids_S) + 1)
        kept = []
        for token in ids_S:
            generator.append_tokens(np.array([[token]], np.int32))
            kept.append(torch.from_numpy(np.array(generator.get_logits())[0, -1].copy()).float())
        return torch.stack(kept)

    def _generator(self, length: int) -> Any:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        return self.og.Generator(self.model, params)


ENGINES = {
    "torch": Torch,
    "hire": HireTorch,
    "openvino": OpenVINO,
    "genai": GenAI,
    "llama.cpp": LlamaCpp,
    "onnxruntime": OnnxGenAI,
}


class GenerateContender:
    """One engine, given fresh prompts in order.

    Args:
        settings: "engine" of `ENGINES` and what it takes; "prompts": token ids; "text": token ids that are read for
            perplexity; "reference": float32's perplexity of it, or None.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        with torch.inference_mode():
            self.engine: Engine = ENGINES[settings["engine"]](settings)
        self.prompts: list[list[int]] = settings["prompts"]
        self.text: list[int] = settings["text"]
        self.reference = settings["reference"]
        self.place = 0
        self.count = 1

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self.count, self.place = case["new_tokens"], 0
        with torch.inference_mode():
            found = perplexity(self.engine.logits(self.text), self.text)
            facts: dict[str, Any] = {"perplexity": found, "bytes_read": self.engine.bytes_read}
            facts |= self.engine.verify()
        if self.reference is not None and not found <= WORSE * self.reference:
            facts["error"] = f"perplexity {found:.1f}, float32's is {self.reference:.1f}: another model"
        made = self.run(self.draw())
        if len(made) != self.count:
            facts["error"] = f"{len(made)} tokens came where {self.count} were asked for"
        return facts | {"verified": "error" not in facts}

    def draw(self) -> list[int]:
        self.place += 1
        return self.prompts[self.place % len(self.prompts)]

    def run(self, inputs: list[int]) -> list[int]:
        with torch.inference_mode():
            return self.engine.generate(inputs, self.count)


def perplexity(logits_SV: Tensor, ids_S: list[int]) -> float:
    """Return exp of the mean of -log p(token | those before it) over a text."""
    targets = torch.tensor(ids_S[1:])
    total = 0.0
    for logits, target in zip(logits_SV[:-1].split(64), targets.split(64), strict=True):
        total += float(torch.nn.functional.cross_entropy(logits.double(), target, reduction="sum"))
    return math.exp(total / len(targets))


def behind(logits_NV: Tensor, tokens: list[int]) -> float:
    """Return how far the logit of one of N tokens lies behind the largest, at most."""
    own = logits_NV.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    return float((logits_NV.amax(1) - own).max())


def _rows(graph: Any, record: dict[str, Any]) -> Tensor:
    """Return the head's rows of a graph, [V, D]."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[record["rows"]]
    node = next(node for node in graph.get_ops() if node.get_type_name() == "HeadArgmax")
    own = torch.from_numpy(node.input_value(2).get_node().get_data())
    return own.view(dtype)


def _all_logits(states_SD: Tensor, rows_VD: Tensor) -> Tensor:
    return torch.cat([head_logits(part, rows_VD) for part in states_SD.split(16)])
