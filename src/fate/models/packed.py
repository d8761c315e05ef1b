"""Dense modules that hold their weight packed and compute from it: never expanded to bf16.

`packed` is the module's whole weight as bytes (see `store/format.py`); `layout` says how to read it. Both modules are
inference only. Families that reach into `module.weight` get a freshly dequantized tensor, slow but right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fate import kernels
from fate.kernels.reference import dequantize
from fate.models.forms import SCALED_EMBEDDINGS, digest
from fate.store.format import MatrixSpec, RecordLayout


class _Packed(nn.Module):
    """`packed` is empty until the loader sets it (uint8 [bytes]); `dtype` is that of the model's activations."""

    def __init__(self, rows: int, cols: int, codec: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layout = RecordLayout(codec, (MatrixSpec("weight", rows, cols),), page_aligned=False)
        self.dtype = dtype
        self.packed = torch.empty(0, dtype=torch.uint8)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight [rows, cols], a new tensor at every access; on the meta device until it is loaded, so
        that a parent that initialises its children's weights does nothing."""
        if not self.packed.numel():
            spec = self.layout.matrices[0]
            return torch.empty(spec.rows, spec.cols, dtype=self.dtype, device="meta")
        return dequantize(self.packed, self.layout, 0).to(self.dtype)

    def extra_repr(self) -> str:
        spec = self.layout.matrices[0]
        return f"{spec.rows}, {spec.cols}, codec={self.layout.codec}"


class PackedLinear(_Packed):
    """`nn.Linear` over a packed weight [out_features, in_features]; `bias` [out_features] stays as it was."""

    def __init__(self, linear: nn.Linear, codec: str, dtype: torch.dtype) -> None:
        super().__init__(linear.out_features, linear.in_features, codec, dtype)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], same dtype."""
        rows = x.reshape(-1, self.in_features)
        return kernels.linear(rows, self.packed, self.layout, bias=self.bias).view(*x.shape[:-1], self.out_features)


class PackedEmbedding(_Packed):
    """`nn.Embedding` over a packed table [num_embeddings, embedding_dim]; rows are unpacked as they are looked up, and
    multiplied by `scale` where the embedding has one."""

    def __init__(self, embedding: nn.Embedding, codec: str, dtype: torch.dtype) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, codec, dtype)
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        name = SCALED_EMBEDDINGS.get(digest(type(embedding).forward))
        self.scale = None if name is None else float(getattr(embedding, name))

    @property
    def weight(self) -> Any:
        """What a row is read of without the others; anything else about it is the dequantized tensor's."""
        return _Table(self) if self.packed.numel() else super().weight

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [n] -> [n, embedding_dim], not scaled."""
        return kernels.gather_rows(self.packed, self.layout, 0, ids, self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int [...] -> [..., embedding_dim]."""
        rows = self.rows(ids.reshape(-1).long()).view(*ids.shape, self.embedding_dim)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=self.dtype)


class _Table:
    """The weight of a packed embedding. Families look at its device and dtype, or take a row of it, in every forward;
    all of it is dequantized only for what nothing less will do for."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        self._embedding = embedding
        self.dtype, self.device, self.is_meta = embedding.dtype, embedding.packed.device, False
        self.shape = torch.Size((embedding.num_embeddings, embedding.embedding_dim))
        self.requires_grad = False

    def __getitem__(self, key: Any) -> torch.Tensor:
        row, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(row, int) and not isinstance(row, bool):
            ids = torch.tensor([row % self.shape[0] if -self.shape[0] <= row < self.shape[0] else row])
            taken: torch.Tensor = self._embedding.rows(ids)[0]
            return taken[tuple(rest)] if rest else taken
        return self._all()[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._all(), name)

    def _all(self) -> torch.Tensor:
        embedding = self.__dict__["_embedding"]
        return dequantize(embedding.packed, embedding.layout, 0).to(embedding.dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def tensor(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(tensor, value))
            return value._all() if isinstance(value, cls) else value

        return function(*map(tensor, args), **{name: tensor(value) for name, value in (kwargs or {}).items()})
