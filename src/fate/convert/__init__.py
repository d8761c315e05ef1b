"""From a Hugging Face checkpoint to a store on disk: streaming, resumable, in memory that does not grow with the model.

What is called is here, and without torch; what it does is in `conversion.py`.

>>> convert("Qwen/Qwen1.5-MoE-A2.7B-Chat", Path("qwen-moe"), expert_bits=4, dense_bits=8)
PosixPath('qwen-moe')
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fate.errors import OutputExistsError, UsageError
from fate.store.files import is_store

EXPERT_BITS = (4, 16, 32)
DENSE_BITS = (4, 8, 16)
Progress = Callable[[int, int, str], None]


def convert(
    src: str | Path,
    out: Path,
    expert_bits: int = 4,
    dense_bits: int = 8,
    force: bool = False,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the checkpoint `src` (a directory or hub id) as a store at `out`, and return `out`.

    expert_bits: 4 (nested INT4/INT2), 16 (bf16 or fp16 as they are) or 32. dense_bits: 4, 8, or 16 to pack nothing.
    trust_remote_code: run the model's own code where it comes with the checkpoint; the store keeps it.
    progress: called with (bytes written, bytes in all, what was written last). Stopping at any moment, by `kill -9`
    too, leaves `OUT.partial`, which the same call resumes.

    Raises UsageError, ModelNotFoundError, NotMoEError, UnsupportedModelError, OutputExistsError, CheckpointError or
    DiskFullError.
    """
    if expert_bits not in EXPERT_BITS or dense_bits not in DENSE_BITS:
        raise UsageError(
            f"expert_bits={expert_bits}, dense_bits={dense_bits}: choose expert_bits from {EXPERT_BITS} and dense_bits "
            f"from {DENSE_BITS}"
        )
    out = Path(out).expanduser()
    out = out.resolve() if out.is_symlink() else out
    if out.exists() and not force:
        raise OutputExistsError(out)
    if out.exists() and not is_store(out):
        raise UsageError(f"{out} exists and is not a store, so it is not replaced: choose another OUT or move it away")
    from fate.convert.checkpoint import resolve_source
    from fate.convert.conversion import Conversion
    from fate.convert.quantized import open_checkpoint
    from fate.store.writer import StoreWriter

    path = resolve_source(src)
    with open_checkpoint(path) as checkpoint:
        conversion = Conversion(checkpoint, expert_bits, dense_bits, trust_remote_code)
        with StoreWriter(out, conversion.plan, force=force) as writer:
            conversion.run(writer, progress or (lambda done, total, what: None))
            return writer.finalize()
