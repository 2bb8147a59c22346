"""What became of a worker that gave up or died, as an error with its reason. Needs no torch."""

import signal
from pathlib import Path
from typing import Final

from fsllm_client.trainer.orders import GaveUp
from fsllm_common.errors import (
    REASONS,
    DataInvalid,
    FsllmError,
    ModelUnusable,
    PlanInvalid,
    SettingsInvalid,
    TrainingFailed,
)

_KILLED: Final = (-signal.SIGKILL, 128 + signal.SIGKILL)


def error_of(gave_up: GaveUp, log: Path) -> FsllmError:
    """Return the error that a rank gave up with."""
    reason = gave_up.reason if gave_up.reason in REASONS else "INTERNAL"
    message = gave_up.message
    match reason:
        case "PLAN_INVALID":
            return PlanInvalid(message, cure=gave_up.cure)
        case "SETTING_INVALID":
            return SettingsInvalid(message, cure=gave_up.cure)
        case "DATA_INVALID":
            return DataInvalid(message, cure=gave_up.cure)
        case "MODEL_MISSING" | "MODEL_UNSUITABLE":
            return ModelUnusable(reason, message, cure=gave_up.cure)
        case "OUT_OF_MEMORY":
            return TrainingFailed(reason, f"{message}; see {log}", cure=gave_up.cure)
        case "LOSS_NOT_FINITE" | "INTERNAL":
            return TrainingFailed(reason, message, cure=gave_up.cure)
    return FsllmError(reason, message, cure=gave_up.cure)


def kernel_kills() -> int | None:
    """Return how many processes the kernel has killed for want of memory since boot, or None where it does not say."""
    try:
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        return None
    return None


def cause(code: int | None, kills_before: int | None, log: str) -> tuple[bool, str]:
    """Tell whether the group died for want of memory, and how it died."""
    if any(words in log for words in ("OutOfMemoryError", "MemoryError", "can't allocate memory", "std::bad_alloc")):
        return True, "its log says so"
    if code is None:
        return False, "closed its socket"
    if code in _KILLED:
        kills = kernel_kills()
        # A SIGKILL may be anyone's; the kernel counts its own.
        if kills is None or kills_before is None or kills > kills_before:
            return True, "killed by the kernel, as it does when memory runs out"
        return False, "was killed (SIGKILL)"
    if code < 0:
        return False, f"was ended by {signal.Signals(-code).name}"
    return False, f"ended by itself with exit code {code}"
