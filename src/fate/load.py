"""`fate.load`: from a model's name to a running transformers model inside a memory budget.

Nothing here imports torch or transformers before it has to: what is read ahead of a load (`read_ahead`) is read while
they are imported.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fate.directories import cache_directory
from fate.errors import OutputExistsError, StoreError, UsageError
from fate.plan.budget import DEFAULT_PREFILL_CHUNK, MemoryPlan, default_budget, describe
from fate.plan.machine import available_bytes, resident_bytes
from fate.store.ahead import DenseWeights
from fate.store.files import PACKED_FILE, is_store, read_config
from fate.systems import EXACT, System, resolve_system
from fate.units import MIB, parse_experts, parse_link, parse_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fate.engine.assembly import LoadOptions
    from fate.engine.session import FateModel

logger = logging.getLogger("fate")
Progress = Callable[[int, int, str], None]
IMPORTS_BYTES = 640 * MIB  # more than a process has resident that has imported all it needs and read nothing


def load(
    model: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    experts: str | int | float | None = None,
    system: str | System = EXACT,
    max_context: int | None = None,
    max_batch: int = 1,
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    logit_rows: int | None = None,
    link: str | float | None = None,
    trust_remote_code: bool = False,
    on_plan: Callable[[MemoryPlan, System], None] | None = None,
    on_convert: Progress | None = None,
    dense: DenseWeights | None = None,
) -> FateModel:
    """Load a Mixture-of-Experts model so that its whole process stays within `memory`.

    model: a store, a checkpoint directory or a hub id; the latter two are converted on first use into the cache
    directory. memory: peak resident size of this process ("6GiB", bytes; None: what is free less a margin).
    experts: at most this share ("25%", 0.25) or number of experts in memory. system: a name from `fate.systems`;
    "exact" stands for the one, of those whose output is bit-identical to the fully resident model, that is usually
    the fastest. max_context, max_batch,
    prefill_chunk (tokens a forward) and logit_rows bound what the plan covers; beyond them a call raises
    EnvelopeError. link: serve the records from a copy in memory at this speed ("12GB/s") instead of from the disk, to
    see how another machine would fare (the copy is a row of the plan). trust_remote_code: run the code of a model that
    brings its own. on_plan is called before slots are allocated; by default the plan goes to standard error. dense:
    what `read_ahead` has begun to read of this store; without it, load begins by itself.

    Returns the transformers model; `model.fate` has `stats()`, `plan` and `close()`, and `with` closes it.
    Raises a FateError: ModelNotFoundError, NotMoEError, UnsupportedModelError, CheckpointError, StoreError,
    MemorySizeError, BudgetTooSmallError, UnknownNameError.
    """
    if memory is not None:
        memory = parse_memory(memory)  # before a conversion that may take minutes
    parse_experts(experts, total=1)
    if link is not None:
        parse_link(link)
    counts = {"max_context": max_context, "max_batch": max_batch, "prefill_chunk": prefill_chunk}
    for name, value, least in [*((n, v, 1) for n, v in counts.items()), ("logit_rows", logit_rows, max_batch)]:
        if value is not None and value < least:
            raise UsageError(f"{name}={value} is not valid: give a whole number of at least {least}")
    wanted = resolve_system(system)
    store = ensure_store(model, on_convert, trust_remote_code)
    if dense is not None and not dense.store.samefile(store):
        raise UsageError(f"dense holds the weights of {dense.store}: give what was read ahead of {store}")
    with read_ahead(store, memory) if dense is None else nullcontext(dense) as reading:
        from fate.engine.assembly import LoadOptions

        options = LoadOptions(
            memory,
            experts,
            wanted,
            max_context,
            max_batch,
            prefill_chunk,
            logit_rows,
            link,
            on_plan or print_plan,
            reading,
        )
        loaded = _load(store, options, trust_remote_code)
    if loaded.fate.system != wanted:
        ensure_profile(loaded)
        loaded.fate.reconfigure(system=wanted, experts=experts, link=link)
    return loaded


@contextmanager
def read_ahead(model: str | os.PathLike[str], memory: str | int | None) -> Iterator[DenseWeights | None]:
    """For the time before `load(..., dense=...)`, in which Python imports what it needs: a thread reads the packed
    dense weights of `model`, if that is a store and `memory` surely holds them. At the end the thread is gone."""
    store = Path(model).expanduser()
    if not is_store(store):
        yield None
        return
    with DenseWeights(store) as dense:
        budget = min(default_budget() if memory is None else parse_memory(memory), available_bytes())
        imports = max(IMPORTS_BYTES, resident_bytes() + IMPORTS_BYTES // 2)  # some may be resident already
        if (file := store / PACKED_FILE).is_file() and file.stat().st_size + imports <= budget:
            dense.start()
        yield dense


def _load(store: Path, options: LoadOptions, trust_remote_code: bool) -> FateModel:
    from fate.models.auto import auto_class
    from fate.models.config import transformers_config

    stored = read_config(store)["quantization_config"]
    config = transformers_config(store, trust_remote_code)
    config.quantization_config = {**stored, "load_options": options}
    loaded = auto_class(config).from_pretrained(store, config=config, dtype="auto", trust_remote_code=trust_remote_code)
    return cast("FateModel", loaded)


def ensure_profile(model: FateModel) -> None:
    """Give `model` the timing profile of its store, measured now (some seconds) unless there is one that holds."""
    from fate.plan.profile import read_profile, write_profile
    from fate.tools.profiling import SAMPLE_TEXT, measure

    store, header = model.fate.reader.path, model.fate.reader.header
    reading = read_profile(store, header)
    profile = reading.profile
    if profile is None:
        logger.warning("timing profile of %s: %s; measuring", store.name, reading.why_not)
        ids = load_tokenizer(store)(SAMPLE_TEXT, return_tensors="pt").input_ids[0]
        profile = measure(model, ids)
        write_profile(profile, store)
    model.fate.use_profile(profile)


def ensure_store(
    model: str | os.PathLike[str], on_convert: Progress | None = None, trust_remote_code: bool = False
) -> Path:
    """The store of `model`: itself, or its checkpoint converted (once, with the default options) into the cache."""
    if is_store(path := Path(model).expanduser()):
        return path
    from fate.convert import convert
    from fate.convert.checkpoint import resolve_source

    source = resolve_source(os.fspath(model))
    name = Path(model).name  # a hub id's last part; the snapshot directory it resolves to is called by a hash
    store = cache_directory() / f"{name}-{store_identity(source, trust_remote_code)[:12]}"
    if is_store(store):
        return store
    try:
        return convert(source, store, progress=on_convert, trust_remote_code=trust_remote_code)
    except OutputExistsError:  # another process has made it in the meantime
        return store


def store_identity(source: Path, trust_remote_code: bool) -> str:
    """What a cached store is known by: its format, the checkpoint, and the tokenizer and other files kept beside it."""
    from fate.convert.quantized import open_checkpoint
    from fate.convert.source import copied_files
    from fate.store.format import FORMAT_VERSION

    with open_checkpoint(source) as checkpoint:
        digest = hashlib.sha256(f"{FORMAT_VERSION} {checkpoint.fingerprint()}".encode())
        own_code = trust_remote_code and "auto_map" in checkpoint.config
    if own_code:  # the store runs that code, where it would else run what transformers has
        digest.update(b"own code")
    for name, content in copied_files(source, code=own_code).items():
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def load_tokenizer(store: Path) -> PreTrainedTokenizerBase:
    """The tokenizer kept in `store`; raises StoreError where there is none that transformers can load."""
    from transformers import AutoTokenizer

    read_config(store)
    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(store, trust_remote_code=False))
    except Exception as error:  # tokenizers raises nothing narrower for a file it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise StoreError(
            f"{store} has no tokenizer that transformers can load ({reason}): copy the model's tokenizer files into it"
        ) from error


def print_plan(plan: MemoryPlan, system: System) -> None:
    """The plan, on standard error, before anything is allocated."""
    print(f"system {system.name}{'' if system.exact else ' (lossy)'}", describe(plan), sep="\n", file=sys.stderr)
