"""Checkpoints quantized by others: what is read is what their own formula says, and a model made of it is the model
made of the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import fate
from fate.convert import convert
from fate.convert.checkpoint import Checkpoint
from fate.convert.quantized import QuantizedCheckpoint, open_checkpoint
from fate.errors import UnsupportedModelError
from tiny import tiny_checkpoint

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
FP8_BLOCK = 16
GROUP = 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_fp8(name: str, weight: torch.Tensor) -> Packed:
    """A scale for every block of 16 by 16; 48 rows and 160 columns end in whole blocks, 24 rows do not."""
    rows, cols = (-(-size // FP8_BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * FP8_BLOCK, cols * FP8_BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, FP8_BLOCK, cols, FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-6) / 448
    codes = (blocks / scales[:, None, :, None]).view_as(padded).to(torch.float8_e4m3fn)
    wide = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    cut = tuple(slice(size) for size in weight.shape)
    return {f"{name}.weight": codes[cut].clone(), f"{name}.weight_scale_inv": scales}, (codes.float() * wide)[cut]


def pack_gptq(name: str, weight: torch.Tensor, bits: int = 4) -> Packed:
    """Columns belong to groups in no order; zero points are stored less one."""
    codes, zeros, scales, group = _integers(weight, bits)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    codes, group = codes[order], group[order]
    dequantized = (scales[group] * (codes - zeros[group])).T
    tensors = {"qweight": _words(codes, bits, 0), "qzeros": _words(zeros - 1, bits, 1)}
    tensors |= {"scales": scales, "g_idx": group.int()}
    return {f"{name}.{end}": tensor.contiguous() for end, tensor in tensors.items()}, dequantized


def pack_awq(name: str, weight: torch.Tensor) -> Packed:
    codes, zeros, scales, group = _integers(weight, 4)
    ordered = [t.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1) for t in (codes, zeros)]
    tensors = {"qweight": _words(ordered[0], 4, 1), "qzeros": _words(ordered[1], 4, 1), "scales": scales}
    return {f"{name}.{end}": tensor for end, tensor in tensors.items()}, (scales[group] * (codes - zeros[group])).T


SCHEMES: dict[str, tuple[Callable[[str, torch.Tensor], Packed], dict[str, object]]] = {
    "fp8": (pack_fp8, {"weight_block_size": [FP8_BLOCK, FP8_BLOCK]}),
    "gptq": (pack_gptq, {"bits": 4, "group_size": GROUP}),
    "awq": (pack_awq, {"bits": 4, "group_size": GROUP, "version": "gemm"}),
}


@pytest.mark.parametrize("method", SCHEMES)
def test_a_quantized_checkpoint_is_the_model_of_its_dequantized_weights(method: str, tmp_path: Path) -> None:
    pack, settings = SCHEMES[method]
    source = tiny_checkpoint("deepseek_v3")
    quantized, plain = _rewrite(source, tmp_path, pack, {"quant_method": method, **settings})
    logits = []
    for name, path in (("quantized", quantized), ("plain", plain)):
        store = convert(path, tmp_path / f"store-{name}", expert_bits=32, dense_bits=16)
        assert json.loads((store / "config.json").read_text())["quantization_config"]["quant_method"] == "fate"
        with fate.load(store, experts=1, on_plan=lambda plan, system: None) as model:
            logits.append(model(torch.arange(3, 40)[None]).logits)
    assert torch.equal(*logits)


def test_gptq_of_other_widths(tmp_path: Path) -> None:
    for bits in (2, 8):
        folder = tmp_path / str(bits)
        pack = lambda name, weight, bits=bits: pack_gptq(name, weight, bits)  # noqa: E731
        paths = _rewrite(tiny_checkpoint("mixtral"), folder, pack, {"quant_method": "gptq", "bits": bits})
        _assert_same_tensors(*paths)


def test_fp8_says_what_transformers_says() -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    tensors, ours = pack_fp8("x", weight)
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["x.weight"], tensors["x.weight_scale_inv"], torch.float32)
    assert torch.equal(ours, theirs)


def test_mxfp4_says_what_transformers_says(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 132, (3, 10, 2), generator=generator, dtype=torch.uint8)
    save_file({"w_blocks": blocks, "w_scales": scales, "other": scales.clone()}, tmp_path / "model.safetensors")
    config = {"model_type": "gpt_oss", "dtype": "float32", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.keys()) == ["other", "w"]
        expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(checkpoint.read("w"), expected)
        assert torch.equal(checkpoint.read_rows("w", 1, 2), expected[1:2])
        assert checkpoint.nbytes("w") == expected.nbytes


def test_mxfp4_experts_make_a_store(tmp_path: Path) -> None:
    """gpt-oss as it is published: experts in MXFP4, everything else as it was."""
    overrides = {"head_dim": 16, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]}
    source = tiny_checkpoint("gpt_oss", **overrides)
    generator = torch.Generator().manual_seed(6)
    tensors, plain = {}, {}
    with Checkpoint(source) as checkpoint:
        config = checkpoint.config
        for key in sorted(checkpoint.keys()):
            if not key.endswith(("gate_up_proj", "down_proj")):
                tensors[key] = plain[key] = checkpoint.read(key)
                continue
            experts, reduction, output = checkpoint.shape(key)
            shape = (experts, output, reduction // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(119, 123, shape, generator=generator, dtype=torch.uint8)
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            plain[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    quantized = _write(tmp_path / "q", tensors, {**config, "quantization_config": {"quant_method": "mxfp4"}})
    logits = []
    for path in (quantized, _write(tmp_path / "p", plain, config)):
        store = convert(path, path / "store", expert_bits=32, dense_bits=16)
        with fate.load(store, experts=1, on_plan=lambda plan, system: None) as model:
            logits.append(model(torch.arange(3, 40)[None]).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "aqlm"}, "'aqlm'.*known are awq, fp8, gptq, mxfp4"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits: 2 or 4 or 8"),
        ({"quant_method": "awq", "version": "gemv"}, "'gemv'"),
    ],
)
def test_what_cannot_be_read_is_refused(settings: dict[str, object], says: str, tmp_path: Path) -> None:
    quantized, _ = _rewrite(tiny_checkpoint("mixtral"), tmp_path, pack_fp8, settings)
    with pytest.raises(UnsupportedModelError, match=says):
        convert(quantized, tmp_path / "store")


def _integers(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [reduction, output], zero points and scales [groups, output], and the group of each column."""
    grouped = weight.T.unflatten(0, (-1, GROUP))
    low, high = grouped.amin(1), grouped.amax(1)
    scales = ((high - low) / (2**bits - 1)).clamp_min(1e-4).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1).int()
    codes = (grouped / scales[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1).int().flatten(0, 1)
    return codes, zeros, scales, torch.arange(weight.shape[1]) // GROUP


def _words(fields: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    count = 32 // bits
    words = torch.zeros([size // count if at == dim else size for at, size in enumerate(fields.shape)]).long()
    for at in range(count):
        words |= fields.long().index_select(dim, torch.arange(at, fields.shape[dim], count)) << (bits * at)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _rewrite(
    source: Path, folder: Path, pack: Callable[[str, torch.Tensor], Packed], settings: dict[str, object]
) -> tuple[Path, Path]:
    """`source` with its linear layers packed, and with what they are packed to written plainly."""
    packed, plain = {}, {}
    with Checkpoint(source) as checkpoint:
        config = checkpoint.config
        for key in sorted(checkpoint.keys()):
            value = checkpoint.read(key)
            if key.endswith("_proj.weight"):
                tensors, value = pack(key.removesuffix(".weight"), value)
                packed |= tensors
            else:
                packed[key] = value
            plain[key] = value.contiguous()
    quantized = _write(folder / "quantized", packed, {**config, "quantization_config": settings})
    return quantized, _write(folder / "plain", plain, config)


def _write(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Path:
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def _assert_same_tensors(quantized: Path, plain: Path) -> None:
    with open_checkpoint(quantized) as got, Checkpoint(plain) as expected:
        assert isinstance(got, QuantizedCheckpoint)
        assert sorted(got.keys()) == sorted(expected.keys())
        for key in sorted(expected.keys()):
            assert got.shape(key) == expected.shape(key)
            assert torch.equal(got.read(key), expected.read(key))
            assert torch.equal(got.read_rows(key, 1, 3), expected.read_rows(key, 1, 3))
