"""One typed error per way a user can be wrong or a machine can fail.

Every message is one line that names the value, what is allowed and the fix; sizes come as text (`fate.units`).
`exit_code` is what the command line returns: 2 for a wrong request, 1 for a failure while carrying out a right one.
"""

from __future__ import annotations

from collections.abc import Iterable


class FateError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code = 1


class UsageError(FateError):
    """The request itself cannot be carried out."""

    exit_code = 2


class CannotFitError(FateError):
    """No budget that was asked about holds the model."""

    exit_code = 3

    def __init__(self, smallest: str) -> None:
        super().__init__(f"none of these budgets holds the model: the smallest that does is --memory {smallest}")


class UnknownNameError(UsageError):
    def __init__(self, kind: str, name: str, allowed: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}: choose one of {', '.join(sorted(allowed))}")


class NeedsFutureError(UsageError):
    """A system that must be told what will be routed, where nobody can know."""

    def __init__(self, system: str) -> None:
        super().__init__(
            f"system {system!r} must know the routing to come, which only fate bench systems has (it records it): "
            "compare it there, or choose another system"
        )


class MemorySizeError(UsageError):
    """A memory size that cannot be read, or is not positive."""

    def __init__(self, value: object) -> None:
        super().__init__(f"memory size {value!r} is not valid: write a positive size such as 6GiB, 900MB or 4096MiB")


class ExpertShareError(UsageError):
    """A share or number of experts that cannot be read, or is not positive."""

    def __init__(self, value: object) -> None:
        super().__init__(f"experts {value!r} is not valid: write a share such as 25% or a positive number")


class LinkSpeedError(UsageError):
    """A link's speed that cannot be read, or is not positive."""

    def __init__(self, value: object) -> None:
        super().__init__(
            f"link speed {value!r} is not valid: write a positive number of bytes per second such as 12GB/s, 800MB/s "
            "or 1GiB/s"
        )


class LinkMemoryError(UsageError):
    """An emulated link moves from memory, which cannot hold all experts."""

    def __init__(self, needed: str, free: str) -> None:
        super().__init__(
            f"an emulated link keeps all experts in memory, which takes {needed}, and {free} are free: leave the link "
            "out (experts then come from the disk) or use a smaller store"
        )


class MissingPackageError(UsageError):
    """An optional dependency is asked for and is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'fate-moe[{extra}]'")


class BudgetTooLargeError(UsageError):
    """More than this machine (or its cgroup) has free."""

    def __init__(self, planned: str, available: str, largest: str) -> None:
        super().__init__(f"the plan needs {planned} and {available} are free: give a budget of at most {largest}")


class BudgetTooSmallError(UsageError):
    """`smallest_bytes` is the smallest budget that fits this model and envelope."""

    def __init__(self, budget: str, smallest_bytes: int, smallest: str, detail: str) -> None:
        self.smallest_bytes = smallest_bytes
        super().__init__(
            f"a budget of {budget} is too small ({detail}): the smallest that works is {smallest} for this context and "
            "batch"
        )


class EnvelopeError(UsageError):
    """A prompt, batch or generation beyond what the memory plan covers."""


class EmptyPromptError(UsageError):
    def __init__(self) -> None:
        super().__init__("the prompt is empty: give at least one token of text")


class ModelNotFoundError(UsageError):
    """Neither a directory nor a reachable hub id."""


class NotMoEError(UsageError):
    """The model has no experts for Fate to hold."""


class UnsupportedModelError(UsageError):
    """An architecture outside the contract; the message says which part it breaks."""


class OutputExistsError(UsageError):
    def __init__(self, path: object) -> None:
        super().__init__(f"{path} exists already: choose another OUT or pass --force to replace it")


class CheckpointError(FateError):
    """A source checkpoint with a missing or truncated shard, or missing tensors."""


class StoreError(FateError):
    """A store that cannot be used: cut short, damaged, of another version or of another model."""


class StoreVersionError(StoreError):
    pass


class ChecksumError(StoreError):
    pass


class StoreMismatchError(StoreError):
    pass


class DiskFullError(FateError):
    pass


class TransferError(FateError):
    """A read of expert bytes failed; the original error is its `__cause__`."""


class TraceError(FateError):
    """A routing trace that cannot be used: not one, of another version, cut short or damaged. line: None: all of it."""

    def __init__(self, path: object, line: int | None, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if line is None else f"{path}, line {line}: {problem}")


class MissingCostsError(UsageError):
    def __init__(self, allocation: str) -> None:
        super().__init__(
            f"allocation {allocation!r} needs what a missing expert costs in each layer, and none was measured: record "
            "a routing trace first, or choose an allocation such as uniform"
        )


class ProfileMissingError(UsageError):
    def __init__(self, system: str) -> None:
        super().__init__(
            f"system {system!r} goes by measured times and there is no profile of this machine and store: call "
            "ensure_profile(model) of fate.load, or run fate profile"
        )


class ClosedError(UsageError):
    def __init__(self) -> None:
        super().__init__("this model was closed: load it again with fate.load")
