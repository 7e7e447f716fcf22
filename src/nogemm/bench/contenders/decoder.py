"""The worker's side of `nogemm bench decoder`: whole ReLU decoders, a token a call, with a cache of keys and values.

Legend: L layers, D width, F neurons, H heads, T tokens in the cache, V vocabulary.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.convert.convert import convert
from nogemm.convert.head import convert_head
from nogemm.convert.pack import pack
from nogemm.convert.sites import converted, record_sites
from nogemm.export import decoder_graph as dg
from nogemm.export import export_decoder
from nogemm.export.extension import LIBRARY
from nogemm.export.folder import MODEL
from nogemm.export.memory import Memory
from nogemm.export.openvino_host import load, quiet, shared_core
from nogemm.hardware.memory import peak_memory_bytes
from nogemm.heads import HireHead
from nogemm.layers import HireConfig, HireFFN
from nogemm.ops import head_logits

# Largest error of a step's logits, as a share of their norm, against float32 products of the same bfloat16 weights.
CLOSE = {"bf16": 0.05, "int8": 0.15}
ALLOWED_BEYOND = 16  # tokens that are decoded behind the prompt before the cache is cut back to it
_STD = 0.02
_TOKENS_MEASURED = 8


def make_decoder(shape: dict[str, Any]) -> Any:
    """Make an OPT model in bfloat16 with random weights, whose biases let a given share of its neurons fire.

    A state behind LayerNorm has length sqrt(D), so that a random neuron's pre-activation is normal with deviation |w|:
    its bias is -z |w| with z such that a normal variable exceeds it with probability `active`.

    Args:
        shape: "d", "hidden", "layers", "heads", "vocabulary", "active", "seed".
    """
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=shape["d"],
        word_embed_proj_dim=shape["d"],
        ffn_dim=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        vocab_size=shape["vocabulary"],
        max_position_embeddings=256,
        activation_function="relu",
    )
    with torch.device("meta"):
        model: Any = OPTForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    source = torch.Generator().manual_seed(shape["seed"])
    z = NormalDist().inv_cdf(1.0 - shape["active"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=_STD, generator=source)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        for layer in model.model.decoder.layers:
            layer.fc1.bias.copy_(-z * layer.fc1.weight.float().norm(dim=1))
    return model.eval().requires_grad_(False)


class DecoderContender:
    """Feeds given tokens one at a time; what all contenders share.

    Args:
        settings: "shape" as `make_decoder` takes it, "file" with prompt, tokens and reference logits, "engine".
    """

    precision = "int8"

    def __init__(self, settings: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        warnings.simplefilter("ignore")
        self.settings, self.shape = settings, settings["shape"]
        stored = load_file(Path(settings["file"]))
        self.prompt_1T, self.tokens_N, self.logits_NV = stored["prompt"], stored["tokens"], stored["logits"]
        self.past = [stored["keys"], stored["values"]]
        self.place = 0

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        facts = self.build()
        errors, same = [], 0
        self.restart()
        for token, logits_V in zip(self.tokens_N.tolist(), self.logits_NV, strict=True):
            found = self.logits(token)
            errors.append(float((found - logits_V).norm() / logits_V.norm()))
            same += int(found.argmax() == logits_V.argmax())
        worst = max(errors)
        facts |= {"layers": 1, "computes_in": self.precision, "memory_bytes": peak_memory_bytes()}
        facts |= {"verified": worst <= CLOSE[self.precision], "max_error": worst, "agreement": same / len(errors)}
        if not facts["verified"]:
            facts["error"] = f"does not match the reference: logits are off by {worst:.3f} of their norm"
        self.restart()
        return facts

    def draw(self) -> int:
        if self.place == min(ALLOWED_BEYOND, len(self.tokens_N)):
            self.restart()
        self.place += 1
        return int(self.tokens_N[self.place - 1])

    def restart(self) -> None:
        """Cut the cache back to the prompt."""
        self.place = 0
        self.rewind()

    def build(self) -> dict[str, Any]:
        """Make the model; return facts, among them "bytes_read" of a token's weights."""
        raise NotImplementedError

    def rewind(self) -> None:
        """Let the cache hold the prompt alone."""
        raise NotImplementedError

    def logits(self, token: int) -> Tensor:
        """Decode one token and return its logits, float32 [V]."""
        raise NotImplementedError

    def run(self, inputs: int) -> Any:
        """Decode one token and name the next."""
        raise NotImplementedError


class TorchDecoder(DecoderContender):
    """transformers' own model and cache, in bfloat16, or in int8 by torch's dynamic quantisation."""

    def build(self) -> dict[str, Any]:
        self.precision = self.settings["engine"].rpartition("-")[2]
        self.model = make_decoder(self.shape)
        count = sum(p.numel() for p in self.model.parameters())
        if self.precision == "int8":
            from torch.ao.quantization import quantize_dynamic

            for layer in self.model.model.decoder.layers:  # one at a time: the whole in float32 is twice its size
                quantize_dynamic(layer.float(), {nn.Linear}, dtype=torch.qint8, inplace=True)
                gc.collect()
            self.model.float()
            quantize_dynamic(self.model, {nn.Linear}, dtype=torch.qint8, inplace=True)
        self.fill()
        return {"bytes_read": float(count * (1 if self.precision == "int8" else 2))}

    def fill(self) -> None:
        """Give the cache the prompt."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            self.model(input_ids=self.prompt_1T, past_key_values=self.cache, use_cache=True)

    def rewind(self) -> None:
        beyond = int(self.cache.get_seq_length()) - self.prompt_1T.shape[1]
        if beyond:
            self.cache.crop(-beyond)

    def _state(self, token: int) -> Tensor:
        ids = torch.tensor([[token]])
        found = self.model.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        return found.last_hidden_state[:, -1]

    def logits(self, token: int) -> Tensor:
        with torch.inference_mode():
            return self.model.lm_head(self._state(token))[0].float()

    def run(self, inputs: int) -> Any:
        with torch.inference_mode():
            return self.model.lm_head(self._state(inputs)).argmax(-1)


class OurDecoder(TorchDecoder):
    """The same model with its FFNs converted, its body in int8 and its head proven, in transformers."""

    def build(self) -> dict[str, Any]:
        facts = self.convert()
        pack(self.model, "int8", body="int8")
        gc.collect()
        self.fill()
        return facts

    def convert(self) -> dict[str, Any]:
        """Make the model with its FFNs and head converted, not packed yet; return facts."""
        self.model = make_decoder(self.shape)
        keep, sketch = self.settings["keep"], self.settings["sketch"]
        convert(self.model, HireConfig(keep=keep, select="active", sketch=sketch), faster_at=None)
        facts = self._recall()
        source = torch.Generator().manual_seed(1)
        texts = torch.randint(4, self.shape["vocabulary"], (4, 64), generator=source)
        head = convert_head(self.model, data=[{"input_ids": texts}])
        body = sum(p.numel() for n, p in self.model.named_parameters() if "_proj.weight" in n)
        layers = [layer for layer in converted(self.model).values() if isinstance(layer, HireFFN)]
        read = sum(sum(layer.traffic(1)) for layer in layers)  # a byte a number
        facts["bytes_read"] = float(body + read + head.codes().bytes)
        return facts

    def _recall(self) -> dict[str, Any]:
        """Measure every layer on the states that the prompt gives it."""
        with torch.no_grad(), record_sites(self.model) as seen:
            self.model(input_ids=self.prompt_1T)
        reports = [
            layer.measure(seen[name][0].reshape(-1, self.shape["d"])[-_TOKENS_MEASURED:])
            for name, layer in converted(self.model).items()
            if isinstance(layer, HireFFN)
        ]
        kept, computed = ([getattr(one, name) for one in reports] for name in ("kept", "computed"))
        facts: dict[str, Any] = {"recall": min(one.recall for one in reports)}
        return facts | {"kept": sum(kept) / len(kept), "computed": sum(computed) / len(computed)}

    def run(self, inputs: int) -> Any:
        head = self.model.get_output_embeddings()
        assert isinstance(head, HireHead)
        with torch.inference_mode():
            return head.choose(self._state(inputs)).token


class ExportedDecoder(OurDecoder):
    """The same model exported to OpenVINO: FFNs and head are our operators, attention's matrices int8 by NNCF."""

    def build(self) -> dict[str, Any]:
        facts = self.convert()
        self.rows_VD = self.model.get_output_embeddings().weight.detach().clone()
        with tempfile.TemporaryDirectory(prefix="nogemm-bench-") as folder:
            with quiet():
                record = export_decoder(self.model, folder, body="int8", rows="bf16", dtype="int8")
            del self.model
            gc.collect()
            graph = load(Path(folder) / MODEL, Path(folder) / LIBRARY)
            dg.keep_outputs(graph, (dg.STATE, dg.TOKEN))
            request = dg.compile_graph(graph, torch.get_num_threads()).create_infer_request()
        self.memory = Memory(request)
        self.memory.run(self.prompt_1T, None, {})
        return facts | {"states_agree": record.agreement}

    def rewind(self) -> None:
        self.memory.cut(self.prompt_1T.shape[1])

    def logits(self, token: int) -> Tensor:
        state_D = self.memory.run(torch.tensor([[token]]), None, {})[dg.STATE][0, 0]
        return head_logits(torch.from_numpy(state_D.copy()).unsqueeze(0), self.rows_VD)[0]

    def run(self, inputs: int) -> Any:
        return self.memory.run(torch.tensor([[inputs]]), None, {})[dg.TOKEN][0, 0]


class Step(nn.Module):
    """One token through an OPT decoder, caches in and out as tensors: what OpenVINO converts.

    forward(ids [1, 1], position [1, 1], keys and values of every layer [1, H, T, D / H]) -> logits [1, 1, V], then the
    caches with the token behind them, in the same order.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.lm_head = model.model.decoder, model.lm_head
        self.heads = model.config.num_attention_heads
        self.positions = nn.Embedding.from_pretrained(model.model.decoder.embed_positions.weight)

    def forward(self, ids: Tensor, position: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Decode one token."""
        x = self.decoder.embed_tokens(ids) + self.positions(position + 2)  # OPT's positions begin at 2
        present = []
        for place, layer in enumerate(self.decoder.layers):
            attention, h = layer.self_attn, layer.self_attn_layer_norm(x)
            query, key, value = (
                part(h).view(1, 1, self.heads, -1).transpose(1, 2)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys = torch.cat((past[2 * place], key), 2)
            values = torch.cat((past[2 * place + 1], value), 2)
            mixed = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).reshape(1, 1, -1)
            x = x + attention.out_proj(mixed)
            x = x + layer.fc2(torch.relu(layer.fc1(layer.final_layer_norm(x))))
            present += [keys, values]
        return self.lm_head(self.decoder.final_layer_norm(x)), *present


class OpenVinoDecoder(DecoderContender):
    """The dense model in OpenVINO, keys and values in its own state; int8: weights rounded by NNCF."""

    def build(self) -> dict[str, Any]:
        self.precision = self.settings["engine"].rpartition("-")[2]
        model = make_decoder(self.shape)
        count = sum(p.numel() for p in model.parameters())
        graph = self._graph(Step(model))
        del model
        if self.precision == "int8":
            import nncf

            with quiet():
                graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
        config = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
        }
        self.request = shared_core().compile_model(graph, "CPU", config).create_infer_request()
        del graph
        gc.collect()
        return {"bytes_read": float(count * (1 if self.precision == "int8" else 2))}

    def _graph(self, step: Step) -> Any:
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation
        from openvino.frontend.pytorch import patch_model

        vars(patch_model)["__make_16bit_traceable"](step)  # within a class the name itself would be changed
        keys, values = self.past
        past = [part for pair in zip(keys, values, strict=True) for part in pair]
        try:
            with quiet():
                graph = openvino.convert_model(step, example_input=(torch.tensor([[1]]), torch.tensor([[0]]), *past))
        finally:  # functions of torch itself are patched, too, and would compute zeros from here on
            patch_model.unpatch_model(step, "_openvino_module_extension_patch_orig_forward")
        pairs, (heads, _, wide) = {}, past[0].shape[1:]
        shapes = {graph.inputs[0]: [1, 1], graph.inputs[1]: [1, 1]}
        for place in range(len(past)):
            graph.inputs[2 + place].get_tensor().set_names({f"past.{place}"})
            graph.outputs[1 + place].get_tensor().set_names({f"present.{place}"})
            shapes[graph.inputs[2 + place]] = [1, heads, -1, wide]
            pairs[f"past.{place}"] = f"present.{place}"
        graph.reshape(shapes)
        apply_make_stateful_transformation(graph, pairs)
        return graph

    def rewind(self) -> None:
        import openvino

        keys, values = self.past
        for state in self.request.query_state():
            place = int(state.name.partition("present.")[0].removeprefix("past."))
            source = keys if place % 2 == 0 else values
            state.state = openvino.Tensor(source[place // 2].numpy())
        self.length = self.prompt_1T.shape[1]

    def logits(self, token: int) -> Tensor:
        inputs = [torch.tensor([[token]]).numpy(), torch.tensor([[self.length]]).numpy()]
        self.length += 1
        return torch.from_numpy(
            next(iter(self.request.infer(inputs, share_outputs=True).values()))[0, 0].copy()
        ).float()

    def run(self, inputs: int) -> Any:
        return self.logits(inputs).argmax()
