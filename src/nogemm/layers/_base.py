"""What every layer is: a replacement for one transformer FFN, trainable (FFN) or packed for evaluation (PackedFFN).

Flattening of leading dimensions and the checks of shape and dtype happen here, once (`_tokens.py`).

Legend: N tokens (all leading dimensions flattened), D width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from nogemm.config import LayerConfig, check_choice
from nogemm.cost import Cost
from nogemm.errors import ConfigError, PackedError
from nogemm.layers._tokens import flatten_tokens
from nogemm.ops._packing import buffers_from
from nogemm.ops._threads import in_passing
from nogemm.shape import FFNShape

if TYPE_CHECKING:
    from nogemm.layers.dense.layer import DenseFFN

PACK_DTYPES = ("fp32", "bf16", "int8")
PATHS = ("auto", "rows", "dense")


def check_packing(dtype: str, path: str) -> None:
    """Raise ConfigError unless `pack` knows the precision and the path."""
    check_choice("pack", "dtype", dtype, PACK_DTYPES)
    check_choice("pack", "path", path, PATHS)


def is_quantised(module: nn.Module) -> bool:
    """Tell whether torch's dynamic quantisation has replaced an nn.Linear inside: weights are behind a method then."""
    weights = (getattr(part, "weight", None) for part in module.modules())  # torch's parametrisations are modules
    return any(callable(weight) and not isinstance(weight, nn.Module) for weight in weights)


@dataclass(frozen=True)
class Route:
    """What a router decides for each token: which rows of the store it reads, and how much of each.

    Attributes:
        rows: int [N, P], numbers of rows in the layer's store; negative entries are padding.
        weights: [N, P], what each row is multiplied with; None where a packed kernel keeps them in a form of its own.
    """

    rows: Tensor
    weights: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Say how the one native call of a packed layer is taken apart by a profile.

    Attributes:
        number: of csrc/packed/host/phases.h.
        phases: names of its two phases; None for a single one.
        stops: the native call can be stopped after the first, and so be simulated.
    """

    number: int
    phases: tuple[str, str] | None
    stops: bool = True


class FFN(nn.Module, ABC):
    """A trainable feed-forward layer that maps [..., d_model] to [..., d_out].

    Attributes:
        shape: the dense FFN whose place the layer takes.
        fitted: where the weights come from: "random", "exact" (equal to the dense layer), "closed-form" (fitted to
            activations without training) or "distilled".
        site: which site of a model the layer fills, as `convert` notes it; None outside a model.
        untrained: what the parameters were when `convert` left them random; None otherwise.
        row_sparse: whether gradients hold the visited rows alone, where a layer can do so.
        storage: how tables are stored, "fp32" or compressed; None for a layer without tables.
        in_turn: whether a decision of the route depends on those before it.
        chunk: consecutive tokens of a call whose route is chosen together.
        retrieves: whether how many neurons a token computes depends on the token, see `counted_neurons`.
        has_sketch: whether a sketch names the neurons, see `recall_rows`.
        has_cutoff: whether it computes a cutoff that is the dense network's own, see `FFNShape.sparsity`.
        dynamic_int8: whether its int8 form rounds activations too, with one step for a whole call.
    """

    row_sparse = False
    dynamic_int8 = False
    in_turn = False
    chunk = 1
    retrieves = False
    has_sketch = False
    has_cutoff = False
    storage: str | None = None

    def __init__(self, config: LayerConfig, shape: FFNShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.d_model = shape.d_in
        self.d_out = shape.d_out
        self.fitted = "random"
        self.site: Any = None
        self.untrained: dict[str, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d_model] to [..., d_out], computing in the parameters' dtype and returning x's."""
        x_ND = flatten_tokens(type(self).__name__, self.config, x, self.d_model)
        y_ND = self.tokens(x_ND.to(self.compute_dtype()))
        return y_ND.to(x.dtype).reshape(*x.shape[:-1], self.d_out)

    @abstractmethod
    def tokens(self, x_ND: Tensor) -> Tensor:
        """Map [N, d_model] to [N, d_out]; x has the parameters' dtype."""

    @torch.no_grad()
    def route(self, x: Tensor) -> Route:
        """Say which rows each token of x [..., d_model] reads, and how it weighs them: y = bias + sum of weight * row.

        Raises:
            ConfigError: the layer reads all its weights for every token.
        """
        x_ND = flatten_tokens(type(self).__name__, self.config, x, self.d_model)
        return self.routes(x_ND.to(self.compute_dtype()))

    def routes(self, x_ND: Tensor) -> Route:
        """Route tokens [N, d_model] in the parameters' dtype."""
        raise ConfigError(f"a {type(self).__name__} reads all its weights for every token: there is nothing to route")

    def decisions(self, x_ND: Tensor) -> Tensor | None:
        """Return the numbers whose signs decide the route, [N, T, K]; None where it does not hang on signs."""
        return None

    def decided(self, rows_NP: Tensor) -> Tensor:
        """Read off a route's rows which of the `decisions` were positive, bool [N, T, K]."""
        raise ConfigError(f"the rows of a {type(self).__name__} say no bits")

    @abstractmethod
    def cost(self, n_tokens: int = 1) -> Cost:
        """Return FLOP, distinct weight bytes touched (expected, uniform codes) and parameters for `n_tokens` tokens."""

    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the layer computes in: its first floating parameter's.

        A layer has none left where torch's dynamic quantisation has taken them all; what is left takes float32.
        """
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    def row_bytes(self, n_tokens: int) -> float:
        """Return the bytes of all rows that tokens read, repeats counted; 0 for layers that do not read by rows."""
        return 0.0

    def table_parameters(self) -> list[nn.Parameter]:
        """Return what tokens read rows of, an optimiser group of its own: a row learns only when it is read."""
        return []

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return what decides which rows are read, an optimiser group of its own."""
        return []

    def row_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients hold visited rows alone where `row_sparse` asks for it."""
        return []

    def optimiser_groups(self) -> dict[str, list[nn.Parameter]]:
        """Sort the trainable parameters into "projection", "tables" and "other"."""
        groups = {"projection": self.projection_parameters(), "tables": self.table_parameters()}
        taken = {id(p) for group in groups.values() for p in group}
        groups["other"] = [p for p in self.parameters() if id(p) not in taken]
        return {name: [p for p in group if p.requires_grad] for name, group in groups.items()}

    def start_from_mean(self, mean_D: Tensor) -> None:
        """Answer the mean to every token, if this layer is random and learns faster from there; others do nothing."""

    def solve(self, x_ND: Tensor, y_ND: Tensor) -> float | None:
        """Solve for what the answer is linear in, given targets; return 1 - R^2, None where nothing can be solved."""
        return None

    @abstractmethod
    def output_parameters(self) -> list[nn.Parameter]:
        """Return what the answer is a multiple of: where all of it is zero, so is the answer to every token.

        Raises:
            ConfigError: there is nothing of the kind, as in a layer that adds its input.
        """

    @torch.no_grad()
    def start_at_zero(self) -> None:
        """Answer zero to every token, and learn from there; raises as `output_parameters`."""
        for parameter in self.output_parameters():
            parameter.zero_()

    def fit_rest(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Start as a later term of a sum: from zero, then fit what the former terms leave, y, if it can be solved."""
        self.start_at_zero()
        self.solve(x_ND, y_ND)

    def compress(self, tables: str = "int8") -> FFN:
        """Store tables in fewer bytes, in place; see `LookupFFN.compress`."""
        raise ConfigError(f"compress: a {type(self).__name__} has no tables")

    def decompress(self) -> FFN:
        """Turn compressed tables back into trainable parameters, in place."""
        raise ConfigError(f"decompress: a {type(self).__name__} has no tables")

    @property
    def shares_calls(self) -> bool:
        """Whether a token's answer depends on the other tokens of its call."""
        return self.chunk > 1

    def active_neurons(self) -> int | None:
        """Return how many neurons answer a token, where that is a fixed number; None elsewhere."""
        return None

    def counted_neurons(self, x_ND: Tensor) -> dict[str, Any]:
        """Count the neurons that tokens compute, beside what was expected."""
        raise ConfigError(f"a {type(self).__name__} computes as much for every token")

    def recall_rows(self, x_ND: Tensor) -> list[dict[str, Any]]:
        """Measure what other sketches of the same weights would find on tokens."""
        raise ConfigError(f"a {type(self).__name__} has no sketch")

    def rounded(self, dtype: str) -> FFN:
        """Return a copy whose weights are rounded as `pack(dtype)` rounds them: its error is what packing may cost."""
        twin = copy.deepcopy(self)
        return twin if dtype == "fp32" else twin.to(torch.bfloat16)

    def packed_share(self, dtype: str) -> float:
        """Return the bytes of the packed form as a share of those of the `rounded` copy."""
        return 1.0

    def computes_in(self, dtype: str) -> str:
        """Name what most of the arithmetic of the packed form is done in: "fp32", or "int16" where hashes are."""
        return "fp32"

    def fit_own_weights(self) -> None:
        """Fit what follows from the layer's own weights alone, such as a low-rank sketch; nothing for most."""

    def measured(self, x_ND: Tensor, n_tokens: int, dtype: str) -> dict[str, float]:
        """Return what a bench says of calls of `n_tokens` besides their time, measured on x; nothing for most."""
        return {}

    def fit_dense(self, dense: DenseFFN) -> str:
        """Start from the dense layer's weights where the method allows it; return and set `fitted`."""
        return self.fitted

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Fit in closed form to the dense layer on activations x [N, d_model]; return and set `fitted`."""
        return self.fitted

    def pack(self, dtype: str = "fp32", path: str = "auto") -> PackedFFN:
        """Make the evaluation-only twin, weights laid out for the native kernels; the layer is untouched.

        No thread of the work is left, so that a process may pack, fork, and call the layer in its children.

        Args:
            dtype, path: see `nogemm.pack`.
        Raises:
            PackedError: in training mode.
            ConfigError: an unknown dtype or path.
        """
        check_packing(dtype, path)
        if self.training:
            raise PackedError(f"pack: {type(self).__name__} is in training mode; call eval() first")
        if is_quantised(self):
            raise PackedError(
                f"pack: torch's dynamic quantisation has rounded the matrices of this {type(self).__name__}; pack the "
                f"model first, and quantise what is left of it, or pack the model as it was before"
            )
        return in_passing(lambda: self._packed(dtype, path))

    def _packed(self, dtype: str, path: str) -> PackedFFN:
        self.before_packing()
        twin = next(_PACKED[cls] for cls in type(self).__mro__ if cls in _PACKED)
        packed = twin(self, dtype)
        with buffers_from(None):  # a machine's first choice of a path measures, on layers that it packs for that
            packed.fix_path(path)
        return packed

    def before_packing(self) -> None:
        """Bring up to date what a forward pass would; most layers have nothing of the kind."""

    def extra_repr(self) -> str:
        return f"{self.d_model} -> {self.d_out}, {self.config}"


class _NoBackward(torch.autograd.Function):
    """Pass y through, and explain instead of giving a silent zero when somebody asks for a gradient."""

    @staticmethod
    def forward(ctx: object, y: Tensor, x: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: object, *grad: Tensor) -> tuple[None, None]:
        raise PackedError("packed layers have no gradient; train the unpacked model (pack with keep=True keeps it)")


KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _as_kernels_take(x_ND: Tensor) -> Tensor:
    return x_ND if x_ND.dtype in KERNEL_DTYPES else x_ND.float()


class PackedFFN(nn.Module, ABC):
    """A layer packed for evaluation: no training mode, no gradient, no place in a checkpoint.

    Attributes:
        dtype: "fp32", "bf16" or "int8", see `nogemm.pack`.
        path: "auto", "rows" or "dense", see `nogemm.pack`; layers with one way to answer ignore it.
        native: whether the compiled kernel answers, or PyTorch in its place; None where torch's kernels are the point.
        site: which site of a model the layer fills; None outside a model.
    """

    path = "auto"
    native: bool | None = None

    def __init__(self, layer: FFN, dtype: str) -> None:
        super().__init__()
        self.config = layer.config
        self.d_model = layer.d_model
        self.d_out = layer.d_out
        self.dtype = dtype
        self.site: Any = None
        self._kept: tuple[FFN, ...] = ()  # no child: what is kept must not show in parameters() or state_dict()
        self.training = False

    @property
    def source(self) -> FFN | None:
        """The unpacked layer, if it was kept."""
        return self._kept[0] if self._kept else None

    def keep(self, layer: FFN | None) -> None:
        """Keep the unpacked layer for `nogemm.unpack`; None: let go of it."""
        self._kept = () if layer is None else (layer,)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d_model] to [..., d_out]; y has x's dtype, though no more than float32's precision."""
        x_ND = flatten_tokens(type(self).__name__, self.config, x, self.d_model)
        with torch.no_grad():
            y = self.tokens(_as_kernels_take(x_ND)).to(x.dtype).reshape(*x.shape[:-1], self.d_out)
        if torch.is_grad_enabled() and x.requires_grad:
            return _NoBackward.apply(y, x)  # type: ignore[no-any-return]
        return y

    @abstractmethod
    def tokens(self, x_ND: Tensor) -> Tensor:
        """Map [N, d_model] to [N, d_out] in x's dtype, one of KERNEL_DTYPES."""

    @torch.no_grad()
    def route(self, x: Tensor) -> Route:
        """Say which rows each token of x [..., d_model] reads; see `FFN.route`."""
        return self.routes(_as_kernels_take(flatten_tokens(type(self).__name__, self.config, x, self.d_model)))

    def routes(self, x_ND: Tensor) -> Route:
        """Route tokens [N, d_model]."""
        raise ConfigError(f"a {type(self).__name__} reads all its weights for every token: there is nothing to route")

    @property
    def kernel(self) -> Kernel | None:
        """The one native call that answers; None for a layer of several operators."""
        return None

    def chosen_neurons(self, x_ND: Tensor, *, kept: bool) -> Tensor:
        """Mark each token's candidates, or those of them that answer, bool [N, F]: a sketch's phase by itself."""
        raise ConfigError(f"a {type(self).__name__} has no candidates")

    def fix_path(self, path: str) -> None:
        """Take "rows" or "dense" for every call, or choose again ("auto")."""
        self.path = path

    def train(self, mode: bool = True) -> PackedFFN:
        if mode:
            raise PackedError(f"{type(self).__name__} is for evaluation only; train the unpacked model")
        return self

    def extra_repr(self) -> str:
        return f"{self.d_model} -> {self.d_out}, dtype={self.dtype}, {self.config}"


_PACKED: dict[type[FFN], Callable[[Any, str], PackedFFN]] = {}
PackedT = TypeVar("PackedT", bound=PackedFFN)


def packed_of(layer: type[FFN]) -> Callable[[type[PackedT]], type[PackedT]]:
    """Name a class as a layer's packed twin (class decorator), subclasses' too: it is made from (layer, dtype)."""

    def note(cls: type[PackedT]) -> type[PackedT]:
        _PACKED[layer] = cls
        return cls

    return note
