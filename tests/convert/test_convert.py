"""Conversion: the same bits as transformers loads, safe to kill at any moment, and one-line errors."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fate.convert import conversion, convert
from fate.convert.encode import encode_record, quantize_matrix
from fate.errors import (
    DiskFullError,
    OutputExistsError,
)
from fate.store import writer
from fate.store.format import CHECKSUM_BYTES, CONSTANTS_BYTES, MatrixSpec, RecordLayout, StoreHeader
from fate.store.reader import DENSE_FILE, EXPERTS_FILE, PACKED_FILE, StoreReader
from fate.store.writer import StoreWriter
from tiny import FAMILIES, tiny_checkpoint, tiny_config, tiny_model

_PATHS = {"PYTHONPATH": os.pathsep.join(sys.path)}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GPT_OSS = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "dtype": "float32",
}


def _header(store: Path) -> StoreHeader:
    reader = StoreReader(store)
    reader.close()
    return reader.header


def _raw_experts(store: Path) -> dict[str, torch.Tensor]:
    """Parameter name -> [experts, rows, cols] of a store with a raw codec."""
    header, data = _header(store), (store / EXPERTS_FILE).read_bytes()
    stacked: dict[str, list[torch.Tensor]] = {}
    for index, spec in enumerate(header.layers):
        layout = header.layout(index)
        for expert in range(spec.num_experts):
            start = header.record_offset(index, expert)
            for matrix, section in zip(layout.matrices, layout.sections):
                values = torch.frombuffer(
                    bytearray(data[start + section.high :]), dtype=_DTYPES[header.codec], count=matrix.weights
                )
                stacked.setdefault(f"{spec.module}.{matrix.name}", []).append(values.view(matrix.rows, matrix.cols))
    return {name: torch.stack(experts) for name, experts in stacked.items()}


def _files(store: Path) -> dict[str, str]:
    return {
        path.relative_to(store).as_posix(): xxhash.xxh64_hexdigest(path.read_bytes())
        for path in store.rglob("*")
        if path.is_file()
    }


def _copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


def _assert_same_as_transformers(source: Path, store: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    state = model.state_dict()
    stored = {**load_file(store / DENSE_FILE), **_raw_experts(store)}
    assert set(state) - set(stored) == set(model.all_tied_weights_keys)
    for name, tensor in stored.items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(family)
    assert any(
        ".experts.0." in key for key in json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    )
    _assert_same_as_transformers(source, convert(source, tmp_path / "out", expert_bits=32, dense_bits=16))


def test_ten_experts_and_more_keep_their_order(tmp_path: Path) -> None:
    source = tiny_checkpoint("olmoe", num_experts=12)
    _assert_same_as_transformers(source, convert(source, tmp_path / "out", expert_bits=32, dense_bits=16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_keep_the_source_dtype(dtype: str, tmp_path: Path) -> None:
    source = tiny_checkpoint("deepseek_v3", dtype=dtype)
    store = convert(source, tmp_path / "out", expert_bits=16, dense_bits=16)
    _assert_same_as_transformers(source, store)
    dense = load_file(store / DENSE_FILE)
    kept = {name for name, tensor in dense.items() if tensor.dtype == torch.float32}
    assert kept
    assert all(name.endswith("e_score_correction_bias") for name in kept)


def test_experts_that_are_stacked_already_are_read_row_by_row(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("qwen3_moe").save_pretrained(source, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(source / "model.safetensors")
    _assert_same_as_transformers(source, convert(source, tmp_path / "out", expert_bits=32, dense_bits=16))


def test_transposed_experts_are_stored_rows_by_reduction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **_GPT_OSS))
    model.save_pretrained(tmp_path / "source")
    experts = _raw_experts(convert(tmp_path / "source", tmp_path / "out", expert_bits=32, dense_bits=16))
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
    assert len(experts) == 4
    for name, tensor in experts.items():
        assert torch.equal(tensor, state[name].transpose(1, 2)), name


def test_int4_records_are_those_of_the_loaded_matrices(tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral")
    store = convert(source, tmp_path / "out")
    header, data = _header(store), (store / EXPERTS_FILE).read_bytes()
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    spec, layout, start = header.layers[1], header.layout(1), header.record_offset(1, 5)
    record = encode_record({m.name: state[f"{spec.module}.{m.name}"][5] for m in spec.matrices}, layout)
    stored = data[start : start + layout.record_bytes]
    assert stored == record.numpy().tobytes()
    entry = header.checksums_offset + header.record_index(1, 5) * CHECKSUM_BYTES
    halves = [stored[: layout.split], stored[layout.split :]]
    assert data[entry : entry + 16] == b"".join(xxhash.xxh64_intdigest(h).to_bytes(8, "little") for h in halves)


@pytest.mark.parametrize("dense_bits", [4, 8])
def test_a_matrix_packed_in_slices_has_the_codes_of_the_whole(
    dense_bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint("qwen2_moe")
    monkeypatch.setattr(conversion, "_SLICE_BYTES", 10_000)
    store = convert(source, tmp_path / "out", dense_bits=dense_bits)
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    packed = load_file(store / PACKED_FILE)
    assert "model.embed_tokens.weight" in packed
    for name, record in packed.items():
        whole = quantize_matrix(state[name], f"int{dense_bits}")
        assert record.numel() * 4 > 10_000 or "embed" not in name
        assert torch.equal(record[:4], whole[:4]), f"gain of {name}"
        assert torch.equal(record[CONSTANTS_BYTES:], whole[CONSTANTS_BYTES:]), name


def test_packed_tensors_are_aligned_in_the_file(tmp_path: Path) -> None:
    store = convert(tiny_checkpoint("mixtral"), tmp_path / "out")
    content = (store / PACKED_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 4096 == 0
    fingerprint = header.pop("__metadata__")["fingerprint"]
    assert fingerprint == _header(store).fingerprint
    assert all(entry["data_offsets"][0] % 64 == 0 for entry in header.values())


def test_config_says_what_is_packed_and_tied(tmp_path: Path) -> None:
    store = convert(tiny_checkpoint("qwen3_moe"), tmp_path / "out", dense_bits=4)
    config = json.loads((store / "config.json").read_text())
    ours = config["quantization_config"]
    assert (ours["quant_method"], ours["codec"], ours["dense_bits"]) == ("fate", "int4", 4)
    assert ours["packed"]["model.embed_tokens"] == {"kind": "embedding", "rows": 259, "cols": 128, "codec": "int4"}
    assert ours["packed"]["model.layers.0.self_attn.q_proj"]["kind"] == "linear"
    assert ours["tied"] == {"lm_head": "model.embed_tokens"}
    packed, dense = load_file(store / PACKED_FILE), load_file(store / DENSE_FILE)
    assert set(packed) == {f"{name}.weight" for name in ours["packed"]}
    assert "lm_head.weight" not in {**packed, **dense}
    assert "model.layers.0.mlp.gate.weight" in dense
    layout = RecordLayout("int4", (MatrixSpec("weight", 259, 128),), page_aligned=False)
    assert packed["model.embed_tokens.weight"].shape == (layout.record_bytes,)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in store.iterdir()}


def test_a_tied_model_that_stores_only_its_head(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("qwen3_moe").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    dense = load_file(convert(source, tmp_path / "out", dense_bits=16) / DENSE_FILE)
    assert torch.equal(dense["model.embed_tokens.weight"], tensors["lm_head.weight"])
    assert "lm_head.weight" not in dense


def test_weights_that_differ_are_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("qwen3_moe").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    store = convert(source, tmp_path / "out", dense_bits=16)
    assert torch.equal(load_file(store / DENSE_FILE)["lm_head.weight"], tensors["lm_head.weight"])
    assert json.loads((store / "config.json").read_text())["tie_word_embeddings"] is False


def test_tensors_the_model_does_not_use_are_counted_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    tiny_model("olmoe").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    extra = {f"model.layers.7.mtp.{i}": torch.ones(3) for i in range(2)}
    save_file({**tensors, **extra}, source / "model.safetensors", {"format": "pt"})
    store = convert(source, tmp_path / "out", dense_bits=16)
    assert not set(extra) & set(load_file(store / DENSE_FILE))
    assert "2 checkpoint tensors are not used" in caplog.text


def test_a_weights_file_of_another_name_and_extra_templates(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("olmoe").save_pretrained(source)
    (source / "model.safetensors").rename(source / "weights.safetensors")
    config = json.loads((source / "config.json").read_text())
    named = {"transformers_weights": "weights.safetensors", "auto_map": {"AutoModelForCausalLM": "remote.Code"}}
    (source / "config.json").write_text(json.dumps({**config, **named}))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("template")
    store = convert(source, tmp_path / "out", expert_bits=32, dense_bits=16)
    assert (store / "additional_chat_templates" / "tool.jinja").read_text() == "template"
    assert not {"auto_map", "transformers_weights"} & set(json.loads((store / "config.json").read_text()))
    _assert_same_as_transformers(source, store)


def test_dtype_of_the_weights_where_the_config_has_none(tmp_path: Path) -> None:
    source = _copy(tiny_checkpoint("mixtral", dtype="bfloat16"), tmp_path)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    store = convert(source, tmp_path / "out", expert_bits=16, dense_bits=16)
    assert _header(store).codec == "bf16"
    assert json.loads((store / "config.json").read_text())["dtype"] == "bfloat16"


def test_progress_covers_all_bytes_and_an_interrupt_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny_checkpoint("olmoe"), tmp_path / "out"
    encoded = []

    def counting(matrices: dict[str, torch.Tensor], layout: RecordLayout, unit: float | None = None) -> torch.Tensor:
        encoded.append(layout)
        return encode_record(matrices, layout, unit)

    def interrupt(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "encode_record", counting)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt)
    before = len(encoded)
    assert not out.exists()
    seen: list[tuple[int, int]] = []
    convert(source, out, progress=lambda done, total, what: seen.append((done, total)))
    resumed = len(encoded) - before
    encoded.clear()
    convert(source, tmp_path / "whole")
    assert before + resumed == len(encoded), "no item is made twice"
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert _files(out) == _files(tmp_path / "whole")


def _killed(source: Path, out: Path, writes: int) -> int:
    """Convert in a child that is killed within its write number `writes`; returns its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        real, left = os.pwrite, iter(range(writes - 1, -1, -1))

        def torn(file: int, data: memoryview, offset: int) -> int:
            if not next(left):
                real(file, data[: max(1, len(data) // 2)], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(file, data, offset)

        os.pwrite, writer.SYNC_BYTES = torn, 60_000
        convert(source, out, dense_bits=16)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking a process with threads
def test_killed_at_random_points_it_resumes_to_the_same_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = tiny_checkpoint("deepseek_v2"), tmp_path / "out"
    kills = [random.randrange(4, 25) for _ in range(3)]
    assert [_killed(source, out, writes) for writes in kills] == [-signal.SIGKILL] * 3, kills
    assert not out.exists()
    convert(source, out, dense_bits=16)
    assert "starting again" not in caplog.text
    convert(source, tmp_path / "whole", dense_bits=16)
    assert _files(out) == _files(tmp_path / "whole"), kills


def test_a_partial_of_other_options_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = tiny_checkpoint("olmoe"), tmp_path / "out"
    monkeypatch.setattr(StoreWriter, "finalize", _raise_keyboard_interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, dense_bits=16)
    monkeypatch.undo()
    caplog.clear()
    convert(source, out, dense_bits=8)
    assert "starting again" in caplog.text
    convert(source, tmp_path / "whole", dense_bits=8)
    assert _files(out) == _files(tmp_path / "whole")


def _raise_keyboard_interrupt(self: StoreWriter) -> Path:
    raise KeyboardInterrupt


def test_an_existing_store_is_kept_unless_forced(tmp_path: Path) -> None:
    out = convert(tiny_checkpoint("mixtral"), tmp_path / "out")
    before = _files(out)
    with pytest.raises(OutputExistsError, match="--force"):
        convert(tiny_checkpoint("olmoe"), out)
    assert _files(out) == before
    convert(tiny_checkpoint("olmoe"), out, force=True)
    assert _header(out).model_type == "olmoe"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_forced_conversion_that_fails_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = convert(tiny_checkpoint("mixtral"), tmp_path / "out")
    before, real, calls = _files(out), os.pwrite, []

    def full(file: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFullError, match=r"disk is full.*free"):
        convert(tiny_checkpoint("olmoe"), out, force=True)
    assert _files(out) == before
    monkeypatch.undo()
    convert(tiny_checkpoint("olmoe"), out, force=True)
    convert(tiny_checkpoint("olmoe"), tmp_path / "whole")
    assert _files(out) == _files(tmp_path / "whole")


def test_a_disk_too_small_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DiskFullError, match=r"needs .* more .* 1000 B free"):
        convert(tiny_checkpoint("olmoe"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


_MEASURED = """
import sys
from pathlib import Path
from fate.convert import convert

convert(sys.argv[1], Path(sys.argv[2]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def _peak_bytes(source: Path, out: Path) -> int:
    """Peak resident memory of a process that converts `source`."""
    script = [sys.executable, "-c", _MEASURED, str(source), str(out)]
    done = subprocess.run(script, env={**os.environ, **_PATHS}, check=True, stdout=subprocess.PIPE)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = {}
    for layers in (2, 6):
        torch.set_default_dtype(torch.bfloat16)
        sizes = {"hidden_size": 2048, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
        config = tiny_config(
            "qwen2_moe", dtype="bfloat16", num_hidden_layers=layers, vocab_size=60_000, num_experts=8, **sizes
        )
        try:
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / f"source{layers}")
        finally:
            torch.set_default_dtype(torch.float32)
        peaks[layers] = _peak_bytes(tmp_path / f"source{layers}", tmp_path / f"out{layers}")
        logging.getLogger(__name__).info("%d layers: %d MiB", layers, peaks[layers] >> 20)
    assert peaks[6] - peaks[2] < 100 * 1024**2
    assert peaks[6] < 1024**3
