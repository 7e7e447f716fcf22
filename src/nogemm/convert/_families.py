"""The table of families: which class of transformers holds an FFN, and under which names.

Every class listed computes exactly what its group's adapter says; a test compares their source with the group's first
class. A listed name counts only for transformers' own class: another package's class of the same name may be wired
otherwise, and is proven like any class that is not listed (`discover.py`). Add a family here, or at run time with
`nogemm.register_site`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nogemm.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class SiteAdapter:
    """Paths below the module that holds an FFN; see `register_site` for what each means."""

    up: str
    down: str
    activation: str
    gate: str | None = None
    fused: bool = False
    gate_last: bool = False
    dropout: str | None = None
    between: tuple[str, ...] = ()
    put: str = ""
    sparsity: str | None = None

    @property
    def matrices(self) -> tuple[str, ...]:
        """Paths of the linear layers."""
        return tuple(path for path in (self.up, self.gate, self.down) if path is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, JSON values only."""
        found = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {key: list(v) if isinstance(v, tuple) else v for key, (v, default) in found.items() if v != default}

    @classmethod
    def from_dict(cls, data: Any, name: str) -> SiteAdapter:
        """Read `to_dict`'s form back; `name` is the site's, for the message of CheckpointError."""
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(data).items()}
            adapter = cls(**values)
            words = (*adapter.matrices, adapter.activation, adapter.put, *adapter.between, adapter.dropout or "")
            words = (*words, adapter.sparsity or "")
            if not all(isinstance(word, str) for word in words):
                raise TypeError("a path must be a string")
        except (TypeError, ValueError) as error:
            message = f"config.json, site {name!r}: how its FFN is taken out cannot be read from {data!r}: {error}"
            raise CheckpointError(message) from error
        return adapter


# Split into two modules, with dropout, residual and LayerNorm inside the second: our layer takes the place of the
# first, and the second's matrix becomes Identity.
_SPLIT = SiteAdapter(
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    put="intermediate",
)
# The same with LayerNorm in front: it stays in the first module, so our layer takes the matrix's place in there.
_SPLIT_PRE_NORM = SiteAdapter(
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    put="intermediate.dense",
)
# fc1 and fc2 inline in the decoder layer, which also flattens to [tokens, width] and adds dropout and residual.
_INLINE = SiteAdapter(up="fc1", activation="activation_fn", down="fc2", put="fc1")
_GATED = SiteAdapter(gate="gate_proj", up="up_proj", activation="act_fn", down="down_proj")
_UP_DOWN = SiteAdapter(up="up_proj", activation="act_fn", down="down_proj")
_H_4H = SiteAdapter(up="dense_h_to_4h", activation="act", down="dense_4h_to_h")
# The gate's values go through a cutoff of the class's own, at this share of them.
_GATED_CUTOFF = SiteAdapter(
    gate="gate_proj", up="up_proj", activation="act_fn", down="down_proj", sparsity="activation_sparsity"
)
_GATE_UP = SiteAdapter(up="gate_up_proj", activation="activation_fn", down="down_proj", fused=True)
_WI_WO_GLU = SiteAdapter(up="Wi", activation="act", down="Wo", fused=True)
_FC = SiteAdapter(up="fc1", activation="activation_fn", down="fc2")
_CONV1D = SiteAdapter(up="c_fc", activation="act", down="c_proj", dropout="dropout")
_LIN = SiteAdapter(up="lin1", activation="activation", down="lin2", dropout="dropout")
# The dropout of these lies between the matrices and goes with them; the caller's own dropout stays.
_T5 = SiteAdapter(up="wi", activation="act", down="wo")
_T5_GATED = SiteAdapter(gate="wi_0", up="wi_1", activation="act", down="wo")

GROUPS: dict[SiteAdapter, tuple[str, ...]] = {
    _SPLIT: (
        "BertLayer",
        "RobertaLayer",
        "XLMRobertaLayer",
        "CamembertLayer",
        "ElectraLayer",
        "ErnieLayer",
        "Data2VecTextLayer",
        "LayoutLMLayer",
        "SplinterLayer",
        "RoCBertLayer",
    ),
    _SPLIT_PRE_NORM: ("RobertaPreLayerNormLayer",),
    _INLINE: ("OPTDecoderLayer",),
    _GATED: (
        "LlamaMLP",
        "MistralMLP",
        "Qwen2MLP",
        "Qwen3MLP",
        "GemmaMLP",
        "Gemma2MLP",
        "Gemma3MLP",
        "SmolLM3MLP",
        "OlmoMLP",
        "Olmo2MLP",
        "Olmo3MLP",
        "GraniteMLP",
        "StableLmMLP",
        "NomicBertMLP",
        "EuroBertMLP",
    ),
    _UP_DOWN: ("NemotronMLP", "ArceeMLP"),
    _H_4H: ("PersimmonMLP",),
    _GATED_CUTOFF: ("Gemma3nTextMLP",),
    _GATE_UP: ("Phi3MLP", "GlmMLP", "Glm4MLP"),
    _WI_WO_GLU: ("ModernBertMLP",),
    _FC: ("ViTMLP", "DeiTMLP", "ViTMAEMLP", "Dinov2MLP", "CLIPMLP", "SiglipMLP", "PhiMLP"),
    _CONV1D: ("GPT2MLP", "GPTBigCodeMLP", "GPTNeoMLP"),
    _LIN: ("FFN",),  # DistilBERT
    _T5: ("T5DenseActDense", "MT5DenseActDense", "UMT5DenseActDense", "LongT5DenseActDense"),
    _T5_GATED: ("T5DenseGatedActDense", "MT5DenseGatedActDense", "UMT5DenseGatedActDense"),
}

FAMILIES: dict[str, SiteAdapter] = {name: adapter for adapter, names in GROUPS.items() for name in names}
REGISTERED: set[str] = set()  # names that users added, of whatever package


def listed_adapter(cls: type) -> SiteAdapter | None:
    """Return the adapter of exactly this class, if it is listed or registered."""
    name = cls.__name__
    if name in REGISTERED or cls.__module__.startswith("transformers."):
        return FAMILIES.get(name)
    return None


def is_listed(name: str, adapter: SiteAdapter) -> bool:
    """Tell whether every process with this nogemm takes an FFN out of a class of this name in this way."""
    return name not in REGISTERED and FAMILIES.get(name) == adapter
