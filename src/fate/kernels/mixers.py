"""What mixes the positions of a sequence in a decoder layer: attention, latent attention, the gated delta rule.

Each is built once of packed matrices and small tensors, which must stay where they are, and runs as the middle of a
`decode.MixerHalf`. Wrong shapes and dtypes raise ValueError.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fate.kernels import threads
from fate.kernels.native import DTYPE_CODES
from fate.kernels.ops import Norm, PackedMatrix, extension, native_matrix, native_norm

Rotary = tuple[Tensor, Tensor] | Tensor


class Rotation(enum.IntEnum):
    """How the rotated elements of a head are paired, and what the angles are.

    HALVES: element i with i + dim / 2; cos and sin [rows or 1, 1, dim]. HALVES_ONCE: the same, cos and sin of dim / 2.
    PAIRS_TO_HALVES: element 2i with 2i + 1, which then are elements i and i + dim / 2; cos and sin of dim, whose first
    half is read. PAIRS: element 2i with 2i + 1; complex64 [rows or 1, 1, dim / 2].
    """

    HALVES = 0
    HALVES_ONCE = 1
    PAIRS_TO_HALVES = 2
    PAIRS = 3


class KVRows(NamedTuple):
    """Where each row's keys and values are. Element [head, position, :] of keys[r] is at address
    keys[r] + (head * key_strides[0] + position * key_strides[1]) * itemsize, contiguous over the last dimension.
    The row attends to positions starts[r] up to lengths[r]; its own key and value are written at lengths[r] - 1.
    Latent attention: keys are latent vectors, and values the turned key, of one head."""

    keys: Sequence[int]
    values: Sequence[int]
    key_strides: tuple[int, int]
    value_strides: tuple[int, int]
    starts: Sequence[int]
    lengths: Sequence[int]


class StateRows(NamedTuple):
    """Where each row's state is: addresses of the convolution's last inputs [channels, kernel], of the activations'
    dtype, and of the recurrent state, float32."""

    addresses: Sequence[tuple[int, int]]


class Mixer:
    """hidden: columns of its input. rotation: None where it takes no angles. native: the extension's own object."""

    def __init__(self, hidden: int, dtype: torch.dtype, rotation: Rotation | None, native: Any, held: Any) -> None:
        self.hidden, self.dtype, self.rotation = hidden, dtype, rotation
        self.native = native
        self._held = held  # keeps weights alive


class Attention(Mixer):
    """softmax(scale * q k^T) v. head_dim is that of queries, keys and values. query_norm and key_norm cover a head
    each, or all heads together. gated: behind each head's queries the query matrix gives a gate, whose sigmoid
    multiplies what the head's attention gives. sinks: float32 [heads], a score of each head without a value."""

    def __init__(
        self,
        *,
        query: PackedMatrix,
        key: PackedMatrix,
        value: PackedMatrix,
        output: PackedMatrix,
        query_norm: Norm | None,
        key_norm: Norm | None,
        head_dim: int,
        scale: float,
        dtype: torch.dtype,
        rotation: Rotation = Rotation.HALVES,
        gated: bool = False,
        sinks: Tensor | None = None,
    ) -> None:
        heads = query.layout.matrices[0].rows // (head_dim * (2 if gated else 1))
        if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (heads,)):
            raise ValueError(f"sinks must be float32 [{heads}], not {sinks.dtype} {tuple(sinks.shape)}")
        native = extension().Attention(
            query=native_matrix(query, dtype),
            key=native_matrix(key, dtype),
            value=native_matrix(value, dtype),
            output=native_matrix(output, dtype),
            query_norm=native_norm(query_norm, dtype),
            key_norm=native_norm(key_norm, dtype),
            head_dim=head_dim,
            scale=scale,
            gated=gated,
            sinks=0 if sinks is None else sinks.data_ptr(),
            dtype=DTYPE_CODES[dtype],
        )
        held = query, key, value, output, query_norm, key_norm, sinks
        super().__init__(query.layout.matrices[0].cols, dtype, rotation, native, held)


class LatentAttention(Mixer):
    """Attention over a cache of latent vectors. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.

    query: [heads * (plain + turned), hidden], or of query_down's rows, after query_norm. latent: [latent + turned,
    hidden]; latent_norm: of its latent part. key_up: [heads, plain, latent] of dtype, the rows of `up` that give plain
    keys. up: packed [heads * (plain + value), latent]. output: [hidden, heads * value].
    """

    def __init__(
        self,
        *,
        query_down: PackedMatrix | None,
        query_norm: Norm | None,
        query: PackedMatrix,
        latent: PackedMatrix,
        latent_norm: Norm,
        key_up: Tensor,
        up: PackedMatrix,
        output: PackedMatrix,
        value_dim: int,
        scale: float,
        rotation: Rotation,
        dtype: torch.dtype,
    ) -> None:
        heads, plain, space = key_up.shape
        hidden = latent.layout.matrices[0].cols
        if key_up.dtype != dtype or not key_up.is_contiguous():
            raise ValueError(f"key_up must be contiguous {dtype}, not {key_up.dtype}")
        turned = latent.layout.matrices[0].rows - space
        native = extension().LatentAttention(
            hidden=hidden,
            dtype=DTYPE_CODES[dtype],
            query_down=None if query_down is None else native_matrix(query_down, dtype),
            query_norm=native_norm(query_norm, dtype),
            query=native_matrix(query, dtype),
            latent=native_matrix(latent, dtype),
            latent_norm=native_norm(latent_norm, dtype),
            key_up=key_up.data_ptr(),
            up=native_matrix(up, dtype),
            output=native_matrix(output, dtype),
            shape=(heads, plain, turned, value_dim, space),
            scale=scale,
        )
        held = query_down, query_norm, query, latent, latent_norm, key_up, up, output
        super().__init__(hidden, dtype, rotation, native, held)


class DeltaShape(NamedTuple):
    """kernel: inputs that the convolution sees."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int


class DeltaRule(Mixer):
    """The gated delta rule. Source: Gated Delta Networks, arXiv 2412.06464.

    inputs: qkv [channels, hidden], z [values, hidden], b and a [value heads, hidden]; or two matrices whose rows are in
    the order of key heads: q, k, v and z of each, and its b and a. Each is packed or of dtype. conv: [channels, kernel]
    of dtype. decay and dt_bias: float32 [value heads]; a state is multiplied by exp(decay * softplus(a + dt_bias)).
    norm: of a head's values. The state of a sequence is float32 [value heads, key_dim, value_dim].
    """

    def __init__(
        self,
        *,
        inputs: Sequence[PackedMatrix | Tensor],
        conv: Tensor,
        conv_bias: Tensor | None,
        decay: Tensor,
        dt_bias: Tensor,
        norm: Norm,
        output: PackedMatrix,
        shape: DeltaShape,
        dtype: torch.dtype,
    ) -> None:
        hidden = output.layout.matrices[0].rows
        channels = 2 * shape.key_heads * shape.key_dim + shape.value_heads * shape.value_dim
        wanted = [(conv, dtype, (channels, shape.kernel)), (decay, torch.float32, (shape.value_heads,))]
        wanted += [(dt_bias, torch.float32, (shape.value_heads,))]
        if conv_bias is not None:
            wanted.append((conv_bias, dtype, (channels,)))
        for tensor, of, size in wanted:
            if tensor.dtype != of or tensor.shape != size or not tensor.is_contiguous():
                raise ValueError(f"wanted contiguous {of} {size}, not {tensor.dtype} {tuple(tensor.shape)}")
        native = extension().DeltaRule(
            hidden=hidden,
            dtype=DTYPE_CODES[dtype],
            inputs=[_input(matrix, dtype) for matrix in inputs],
            conv=conv.data_ptr(),
            conv_bias=0 if conv_bias is None else conv_bias.data_ptr(),
            decay=decay.data_ptr(),
            dt_bias=dt_bias.data_ptr(),
            norm=native_norm(norm, dtype),
            output=native_matrix(output, dtype),
            shape=tuple(shape),
        )
        held = inputs, conv, conv_bias, decay, dt_bias, norm, output
        super().__init__(hidden, dtype, None, native, held)
        self.shape = shape

    def __call__(self, x: Tensor, place: StateRows) -> Tensor:
        """x [sequences, tokens, hidden] -> [sequences, tokens, hidden]; extends each sequence's state in its place. The
        bits are those of one token after the other."""
        sequences, tokens, hidden = x.shape
        if x.dtype != self.dtype or hidden != self.hidden or not x.is_contiguous() or not tokens:
            raise ValueError(f"x must be contiguous {self.dtype} [.., tokens, {self.hidden}], not {tuple(x.shape)}")
        if len(place.addresses) != sequences:
            raise ValueError(f"{sequences} sequences need a state each, not {len(place.addresses)}")
        out = torch.empty_like(x)
        self.native.run(x.data_ptr(), tokens, place.addresses, out.data_ptr(), threads.count())
        return out


def angles(rotary: Rotary, rows: int, rotation: Rotation, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Addresses of cos and sin, elements of a head that are rotated, angles from one row to the next (0: one for all),
    and the rotation."""
    tensors = (rotary,) if isinstance(rotary, Tensor) else rotary
    of = torch.complex64 if rotation is Rotation.PAIRS else dtype
    last = tensors[0].shape[-1]
    for tensor in tensors:
        fits = tensor.dtype == of and tensor.shape[0] in (1, rows) and tensor.shape == tensors[0].shape
        if not fits or tensor.numel() != tensor.shape[0] * last or not tensor.is_contiguous():
            raise ValueError(
                f"angles must be contiguous {of} [{rows} or 1, 1, dim], not {tensor.dtype} {tuple(tensor.shape)}"
            )
    dim = last if rotation in (Rotation.HALVES, Rotation.PAIRS_TO_HALVES) else 2 * last
    step = 0 if tensors[0].shape[0] == 1 else dim if rotation is Rotation.PAIRS else last
    return tensors[0].data_ptr(), tensors[-1].data_ptr(), dim, step, int(rotation)


def _input(matrix: PackedMatrix | Tensor, dtype: torch.dtype) -> tuple[Any, int, int]:
    if isinstance(matrix, PackedMatrix):
        return native_matrix(matrix, dtype), 0, 0
    if matrix.dtype != dtype or not matrix.is_contiguous():
        raise ValueError(f"a matrix must be contiguous {dtype}, not {matrix.dtype}")
    return None, matrix.data_ptr(), matrix.shape[0]
