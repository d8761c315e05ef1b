# Addresses are tensors' data_ptr(); dtypes are fate.kernels.native.DTYPE_CODES.
from collections.abc import Sequence

class Record:
    @staticmethod
    def make(int8: bool, bytes: int, places: Sequence[tuple[int, int, int, int, int]]) -> Record: ...

class ExpertActivation:
    @staticmethod
    def make(
        kind: int,
        gated: bool,
        interleaved: bool,
        alpha: float,
        gate_max: float,
        act_max: float,
        up_limit: float,
        up_offset: float,
    ) -> ExpertActivation: ...

def linear(
    record: Record,
    index: int,
    prefix_only: bool,
    packed: int,
    x: int,
    dtype: int,
    tokens: int,
    bias: int,
    out: int,
    threads: int,
) -> None: ...
def experts(
    record: Record,
    activation: ExpertActivation,
    biases: tuple[int, int, int, int, Sequence[int]] | None,  # both addresses, dtype, experts, which of them
    pool: int,
    pool_bytes: int,
    slot_offsets: Sequence[int],
    precisions: Sequence[int],
    pair_offsets: Sequence[int],
    pairs: int,
    num_pairs: int,
    x: int,
    dtype: int,
    tokens: int,
    rows: int,
    top_k: int,
    threads: int,
) -> None: ...
def reduce_rows(
    rows: int,
    weights: int,
    weights_dtype: int,
    tokens: int,
    top_k: int,
    hidden: int,
    out_dtype: int,
    out: int,
    threads: int,
) -> None: ...
def gather_rows(
    record: Record, index: int, packed: int, ids: int, count: int, dtype: int, out: int, threads: int
) -> None: ...
def attend(
    q: int,
    keys: int,
    key_strides: tuple[int, int, int],
    values: int,
    value_strides: tuple[int, int, int],
    dtype: int,
    shape: tuple[int, int, int, int],
    dims: tuple[int, int],
    scale: float,
    sinks: int,
    out: int,
    threads: int,
) -> None: ...
def largest_magnitude(weights: int, dtype: int, pitch: int, rows: int, cols: int) -> float: ...
def quantize_matrix(
    weights: int,
    dtype: int,
    pitch: int,
    rows: int,
    cols: int,
    inverse_unit: float,
    headroom: int,
    settings: tuple[int, float, float, float],
    high: int,
    affine: int,
    low: int,
    threads: int,
) -> tuple[float, float]: ...
def kernel_name() -> str: ...
def available_kernels() -> list[str]: ...
def select_kernels(name: str) -> bool: ...

class Norm:
    def __init__(self, weight: int, cols: int, eps: float, round_before_scale: bool, plus_one: bool) -> None: ...

class PackedMatrix:
    def __init__(self, record: Record, packed: int, bias: int) -> None: ...

class Router:
    def __init__(
        self,
        weight: int,
        experts: int,
        hidden: int,
        top_k: int,
        renormalize: bool,
        score_dtype: int,
        # scoring, float_logits, bias, correction, groups, top_groups, group_best, scaling
        how: tuple[int, bool, int, int, int, int, int, float],
    ) -> None: ...

class SharedExpert:
    def __init__(self, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix, share: int) -> None: ...

RoutedLists = tuple[list[int], list[int], list[float]]

class Buffers:
    def __init__(
        self,
        rows: int,
        hidden: int,
        top_k: int,
        num_experts: int,
        dtype: int,
        residual: int,
        normed: int,
        logits: int,
        scores: int,
        indices: int,
    ) -> None: ...
    def bytes(self) -> int: ...
    def route(self, router: Router, x: int, rows: int, threads: int) -> RoutedLists: ...
    def choose(
        self, x: int, rows: int, indices: int, weights: int, weights_dtype: int, top_k: int, num_experts: int
    ) -> RoutedLists: ...

class Mixer: ...

class Attention(Mixer):
    def __init__(
        self,
        query: PackedMatrix,
        key: PackedMatrix,
        value: PackedMatrix,
        output: PackedMatrix,
        query_norm: Norm,
        key_norm: Norm,
        head_dim: int,
        scale: float,
        gated: bool,
        sinks: int,
        dtype: int,
    ) -> None: ...

class LatentAttention(Mixer):
    def __init__(
        self,
        hidden: int,
        dtype: int,
        query_down: PackedMatrix | None,
        query_norm: Norm,
        query: PackedMatrix,
        latent: PackedMatrix,
        latent_norm: Norm,
        key_up: int,
        up: PackedMatrix,
        output: PackedMatrix,
        shape: tuple[int, int, int, int, int],  # heads, plain, turned, value and latent dimensions
        scale: float,
    ) -> None: ...

class DeltaRule(Mixer):
    def __init__(
        self,
        hidden: int,
        dtype: int,
        inputs: Sequence[tuple[PackedMatrix | None, int, int]],  # packed, or address and rows
        conv: int,
        conv_bias: int,
        decay: int,
        dt_bias: int,
        norm: Norm,
        output: PackedMatrix,
        shape: tuple[int, int, int, int, int],  # key and value heads, their dimensions, kernel
    ) -> None: ...
    def run(self, x: int, tokens: int, states: Sequence[tuple[int, int]], out: int, threads: int) -> None: ...

class MixerHalf:
    def __init__(self, input_norm: Norm, post_norm: Norm, mixer: Mixer) -> None: ...
    def run(
        self,
        buffers: Buffers,
        router: Router | None,
        x: int,
        rows: int,
        rotary: tuple[int, int, int, int, int] | None,
        kv: tuple[Sequence[int], Sequence[int], tuple[int, int], tuple[int, int], Sequence[int], Sequence[int]]
        | None,  # decode.KVRows
        states: Sequence[tuple[int, int]] | None,
        threads: int,
    ) -> RoutedLists | None: ...

class ExpertHalf:
    def __init__(
        self,
        record: Record,
        activation: ExpertActivation,
        biases: tuple[int, int, int, int],  # both addresses, dtype, experts
        shared: SharedExpert | None,
        pool: int,
        pool_bytes: int,
        slot_bytes: int,
        hidden: int,
        dtype: int,
    ) -> None: ...
    def run(
        self,
        buffers: Buffers,
        rows: int,
        experts: Sequence[int],
        slots: Sequence[int],
        precisions: Sequence[int],
        first: bool,
        last: bool,
        out: int,
        add_residual: bool,
        threads: int,
    ) -> None: ...

def norm_rows(norm: Norm, x: int, dtype: int, rows: int, out: int, threads: int) -> None: ...
def route_rows(
    router: Router, x: int, dtype: int, tokens: int, logits: int, scores: int, indices: int, threads: int
) -> None: ...
def multiply_rows(
    weights: int, x: int, dtype: int, rows: int, cols: int, tokens: int, out: int, threads: int
) -> None: ...
def rank_rows(
    weights: int, x: int, dtype: int, experts: int, hidden: int, tokens: int, limit: int, threads: int
) -> list[list[tuple[int, float]]]: ...
def gated_rows(
    gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix, x: int, dtype: int, tokens: int, out: int, threads: int
) -> None: ...
def add_gated_rows(
    experts: int, shared: int, x: int, share: int, dtype: int, tokens: int, hidden: int, out: int, threads: int
) -> None: ...
def scratch_bytes(
    experts: Sequence[Record], tokens: int, hidden: int, widest: int, num_experts: int, threads: int
) -> int: ...
def scratch_held() -> int: ...
