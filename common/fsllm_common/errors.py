"""Every error that fsllm raises for a cause it knows.

The tree::

    FsllmError                  a reason, what happened, where, and the cure
    +-- InputError              what a person gave is wrong: a plan, a setting, data, a model, a file
    |   +-- PlanInvalid
    |   +-- SettingsInvalid
    |   +-- DataInvalid
    |   +-- ModelUnusable
    |   +-- JoinFileInvalid
    +-- Refused                 the other end, or the site's policy, says no; carries its reason
    |   +-- PolicyRefused
    |   +-- UpdateRejected
    +-- Unavailable             the other end can not be reached, or a resource is exhausted; trying again may help
    +-- TrainingFailed          a worker died, ran out of memory, or its loss is not a number

Each reason stands once in ``REASONS`` with the gRPC status that carries it, the exit code of a command that ends with
it, and its cure. ``docs/errors.md`` is made from this table.
"""

from dataclasses import dataclass
from typing import Final, Literal

GrpcStatus = Literal[
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DATA_LOSS",
    "OUT_OF_RANGE",
    "ABORTED",
    "INTERNAL",
]

ERROR_DOMAIN: Final = "fsllm.v1"
"""The ``domain`` of every google.rpc.ErrorInfo."""


class Exit:
    """Exit codes of the three commands. 1 is left to Python's own failures, i.e. to a bug."""

    USAGE: Final = 2
    CONFIGURATION: Final = 3
    DATA: Final = 4
    MODEL: Final = 5
    IDENTITY: Final = 6
    REFUSED: Final = 7
    UNAVAILABLE: Final = 8
    STORAGE: Final = 9
    TRAINING: Final = 10
    RUN_FAILED: Final = 11


@dataclass(frozen=True, slots=True)
class Reason:
    """How one reason travels: its gRPC status, the exit code of a command it ends, and what to do about it."""

    status: GrpcStatus
    exit: int
    cure: str


REASONS: Final[dict[str, Reason]] = {
    # What a person gave.
    "PLAN_INVALID": Reason(
        "INVALID_ARGUMENT",
        Exit.CONFIGURATION,
        "Mend the named key and run `fsllm plan check` again; docs/plans.md lists every key.",
    ),
    "SETTING_INVALID": Reason(
        "INVALID_ARGUMENT",
        Exit.CONFIGURATION,
        "Mend the named flag, environment variable or line of the settings file; --help lists them.",
    ),
    "DATA_INVALID": Reason(
        "FAILED_PRECONDITION",
        Exit.DATA,
        "Mend the named file and line, or map the fields in the plan's data section.",
    ),
    "MODEL_MISSING": Reason(
        "FAILED_PRECONDITION",
        Exit.MODEL,
        "Put the base model on this host and name its folder in the site's policy, under [models].",
    ),
    "NO_GLOBAL_MODEL": Reason(
        "FAILED_PRECONDITION",
        Exit.MODEL,
        "With this method each site has a model of its own, which the sites measure: no evaluator is needed.",
    ),
    "MODEL_UNSUITABLE": Reason(
        "FAILED_PRECONDITION",
        Exit.MODEL,
        "The plan's adapter does not fit this model: change the adapter's targets or kind.",
    ),
    "TRAINER_MISSING": Reason(
        "FAILED_PRECONDITION", Exit.CONFIGURATION, "Install the training stack: pip install 'fsllm[train]'."
    ),
    "NAME_INVALID": Reason(
        "INVALID_ARGUMENT",
        Exit.USAGE,
        "A name is 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit.",
    ),
    "PORT_IN_USE": Reason(
        "UNAVAILABLE", Exit.UNAVAILABLE, "Stop what holds the port, or choose another with the named flag."
    ),
    # Identity.
    "JOIN_FILE_INVALID": Reason(
        "INVALID_ARGUMENT", Exit.IDENTITY, "Ask the operator for a new join file: `fsllm site invite NAME -o FILE`."
    ),
    "JOIN_TOKEN_UNKNOWN": Reason(
        "UNAUTHENTICATED", Exit.IDENTITY, "Ask the operator for a new join file: `fsllm site invite NAME -o FILE`."
    ),
    "JOIN_TOKEN_USED": Reason(
        "UNAUTHENTICATED",
        Exit.IDENTITY,
        "A join file works once. If this site did not use it, tell the operator at once: revoke and invite again.",
    ),
    "JOIN_TOKEN_EXPIRED": Reason(
        "UNAUTHENTICATED", Exit.IDENTITY, "Ask the operator for a new join file: `fsllm site invite NAME -o FILE`."
    ),
    "CSR_INVALID": Reason(
        "INVALID_ARGUMENT", Exit.IDENTITY, "Send a PKCS#10 request in PEM for an ECDSA P-256 key, signed by that key."
    ),
    "NOT_ENROLLED": Reason(
        "UNAUTHENTICATED", Exit.IDENTITY, "Join first: start once with --join FILE, a join file from the operator."
    ),
    "CERTIFICATE_EXPIRED": Reason(
        "UNAUTHENTICATED", Exit.IDENTITY, "Ask the operator for a new join file and start once with --join FILE."
    ),
    "CERTIFICATE_UNTRUSTED": Reason(
        "UNAUTHENTICATED",
        Exit.IDENTITY,
        "This certificate is of another federation. Check --server, or join this one with its own join file.",
    ),
    "IDENTITY_MISSING": Reason(
        "UNAUTHENTICATED", Exit.IDENTITY, "Connect with the client certificate that the federation's CA issued."
    ),
    "MEMBER_REVOKED": Reason(
        "PERMISSION_DENIED",
        Exit.IDENTITY,
        "The operator has revoked this member. Ask the operator for a new invitation.",
    ),
    "ROLE_FORBIDDEN": Reason(
        "PERMISSION_DENIED", Exit.REFUSED, "This call is for another role. Use the credential of that role."
    ),
    "MEMBER_EXISTS": Reason(
        "ALREADY_EXISTS", Exit.REFUSED, "A member of this name is enrolled. Revoke it first, or choose another name."
    ),
    "MEMBER_UNKNOWN": Reason("NOT_FOUND", Exit.REFUSED, "`fsllm site list` shows the members there are."),
    # The stream of orders.
    "PROTOCOL_VERSION": Reason(
        "FAILED_PRECONDITION", Exit.REFUSED, "Install a version of fsllm whose protocol the server accepts."
    ),
    "HELLO_EXPECTED": Reason("FAILED_PRECONDITION", Exit.REFUSED, "Send Hello first, once, and within 10 seconds."),
    "ATTACHED_ELSEWHERE": Reason(
        "ABORTED",
        Exit.IDENTITY,
        "Another daemon has attached under this identity. Run one daemon per site; if the other is not yours, revoke.",
    ),
    "SERVER_STOPPING": Reason("UNAVAILABLE", Exit.UNAVAILABLE, "The daemon attaches again by itself."),
    "SERVER_UNREACHABLE": Reason(
        "UNAVAILABLE", Exit.UNAVAILABLE, "Check the host, the port and the firewall; `fsllm doctor` tries them."
    ),
    "ORDER_UNKNOWN": Reason("FAILED_PRECONDITION", Exit.REFUSED, "The order is no longer wanted; drop it."),
    # Runs.
    "RUN_UNKNOWN": Reason("NOT_FOUND", Exit.REFUSED, "`fsllm run list` shows the runs there are."),
    "RUN_ENDED": Reason("FAILED_PRECONDITION", Exit.REFUSED, "The run has ended; submit a new one."),
    "RUN_NOT_PAUSED": Reason("FAILED_PRECONDITION", Exit.REFUSED, "Only a paused run can be resumed."),
    "RUN_CANCELLED": Reason("ABORTED", Exit.RUN_FAILED, "An operator cancelled the run."),
    "RUN_FAILED": Reason("ABORTED", Exit.RUN_FAILED, "`fsllm run show RUN` says why."),
    "RUN_PAUSED": Reason(
        "ABORTED", Exit.RUN_FAILED, "Mend the cause; then `fsllm run resume RUN` goes on where it stood."
    ),
    "RUN_RESTORED": Reason(
        "ABORTED",
        Exit.RUN_FAILED,
        "The run went back to an earlier round with a back-up: `fsllm run resume RUN` lets it go on from there.",
    ),
    "VERSION_UNKNOWN": Reason("NOT_FOUND", Exit.REFUSED, "`fsllm run show RUN` lists the committed versions."),
    "ROUND_BROKEN": Reason(
        "DATA_LOSS",
        Exit.STORAGE,
        "What is named was changed after its commit: tell those who use the version, and restore from a back-up.",
    ),
    "ROUND_CLOSED": Reason(
        "FAILED_PRECONDITION", Exit.REFUSED, "The round ended without this site; wait for the next."
    ),
    "QUORUM_NOT_REACHED": Reason(
        "FAILED_PRECONDITION", Exit.RUN_FAILED, "Get more sites attached or lower cohort.quorum, then resume the run."
    ),
    "TOO_FEW_UPDATES": Reason(
        "FAILED_PRECONDITION",
        Exit.RUN_FAILED,
        "A robust rule needs more updates than it is to withstand, or one of an evaluator to compare with: start what "
        "the message names and say `fsllm run resume RUN`; or submit a plan with a higher cohort.quorum.",
    ),
    "SITE_IDLE": Reason(
        "ABORTED", Exit.REFUSED, "No step and no byte advanced within the plan's idle time; see the site's log."
    ),
    "VERSION_ZERO_MISMATCH": Reason(
        "FAILED_PRECONDITION",
        Exit.MODEL,
        "This site's base model or libraries differ from the builder's: compare model folders and versions.",
    ),
    "MODEL_DIGEST_MISMATCH": Reason(
        "FAILED_PRECONDITION",
        Exit.MODEL,
        "The sites rebuild the model from the same numbers, to the last bit: compare their versions of fsllm and their "
        "copies of the version; let the odd one out be repaired before it takes part again.",
    ),
    # Uploads and downloads.
    "NOT_WANTED": Reason("FAILED_PRECONDITION", Exit.REFUSED, "The round does not (or no longer) want this update."),
    "BASE_STALE": Reason("FAILED_PRECONDITION", Exit.REFUSED, "Train from the version that the order names."),
    "UPDATE_CONFLICT": Reason(
        "ALREADY_EXISTS", Exit.REFUSED, "Another payload is recorded for this run, round and site; it stays."
    ),
    "MANIFEST_INVALID": Reason(
        "INVALID_ARGUMENT", Exit.REFUSED, "Send the names, types and shapes of the base version, and honest sizes."
    ),
    "CHUNK_CORRUPT": Reason("DATA_LOSS", Exit.UNAVAILABLE, "Send again from the committed offset."),
    "DIGEST_MISMATCH": Reason("DATA_LOSS", Exit.UNAVAILABLE, "Send the payload again from the start."),
    "NOT_FINITE": Reason("INVALID_ARGUMENT", Exit.TRAINING, "The update holds NaN or Inf: lower the learning rate."),
    "NORM_TOO_LARGE": Reason(
        "INVALID_ARGUMENT", Exit.TRAINING, "The update's norm is beyond the plan's bound: clip it or lower the rate."
    ),
    "BLOB_UNKNOWN": Reason("NOT_FOUND", Exit.REFUSED, "Ask for a version that an order or `fsllm run show` names."),
    "OFFSET_OUT_OF_RANGE": Reason("OUT_OF_RANGE", Exit.REFUSED, "Start again at offset 0."),
    "BUSY": Reason("RESOURCE_EXHAUSTED", Exit.UNAVAILABLE, "Try again after the stated delay."),
    "QUOTA_EXCEEDED": Reason(
        "RESOURCE_EXHAUSTED",
        Exit.UNAVAILABLE,
        "Try again after the stated delay; the server's operator can raise the setting that the message names.",
    ),
    "TOO_SLOW": Reason(
        "ABORTED",
        Exit.UNAVAILABLE,
        "The transfer goes on from its offset by itself; on a line this slow, lower --transfer-least-rate.",
    ),
    "MESSAGE_INVALID": Reason(
        "INVALID_ARGUMENT", Exit.REFUSED, "Send what the .proto files say: fields within their sizes and alphabets."
    ),
    "DISK_FULL": Reason(
        "RESOURCE_EXHAUSTED",
        Exit.STORAGE,
        "Free space under the named folder; what was paused for it goes on with `fsllm run resume RUN`.",
    ),
    "DISK_FAILED": Reason(
        "UNAVAILABLE",
        Exit.STORAGE,
        "See the system's log for the disk's errors and mend it; what it failed to keep is written anew. What was "
        "paused for it goes on with `fsllm run resume RUN`.",
    ),
    "STATE_CORRUPT": Reason(
        "DATA_LOSS", Exit.STORAGE, "Restore the state folder from its last back-up; do not delete it before."
    ),
    "BACKUP_INVALID": Reason(
        "DATA_LOSS",
        Exit.STORAGE,
        "Copy the back-up again from where it is kept, or take an older one; empty the folder before the next attempt.",
    ),
    "STATE_LOCKED": Reason(
        "FAILED_PRECONDITION",
        Exit.STORAGE,
        "Another process uses this state folder: stop it, or choose another folder.",
    ),
    "STATE_NEWER": Reason(
        "FAILED_PRECONDITION", Exit.STORAGE, "This state folder was written by a newer fsllm: install that version."
    ),
    # At the site.
    "POLICY_REFUSED": Reason(
        "PERMISSION_DENIED",
        Exit.REFUSED,
        "The site's policy does not allow this plan: change the plan or ask the site.",
    ),
    "BUDGET_SPENT": Reason(
        "PERMISSION_DENIED",
        Exit.REFUSED,
        "The site's privacy budget would be passed: more noise, fewer rounds, or stop.",
    ),
    "LOSS_NOT_FINITE": Reason(
        "ABORTED", Exit.TRAINING, "Training diverged (NaN or Inf): lower train.learning_rate or clip gradients."
    ),
    "OUT_OF_MEMORY": Reason(
        "RESOURCE_EXHAUSTED",
        Exit.TRAINING,
        "Lower train.micro_batch_size or data.max_length, or raise deepspeed.zero_stage and offload.",
    ),
    "WORKER_DIED": Reason("ABORTED", Exit.TRAINING, "See the trainer's log in the site's state folder."),
    "INTERNAL": Reason("INTERNAL", 1, "This is a bug: please report it with the server's log of that minute."),
}


class FsllmError(Exception):
    """An error with a known cause.

    Args:
        reason: A key of ``REASONS``.
        message: What is wrong and where, in one sentence. Never holds a site's data.
        cure: What to do; the reason's own cure when omitted.
        retry_after: Seconds after which trying again makes sense, when it does.

    """

    def __init__(self, reason: str, message: str, *, cure: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.cure = cure if cure is not None else REASONS[reason].cure
        self.retry_after = retry_after

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ends with this error."""
        return REASONS[self.reason].exit

    def __str__(self) -> str:
        """Return the message with its reason and cure, as people see it."""
        return f"{self.message} [{self.reason}] {self.cure}"


class InputError(FsllmError):
    """What a person gave is wrong."""


class PlanInvalid(InputError):
    """A plan has a wrong key or value, or combines what does not go together."""

    def __init__(self, message: str, *, cure: str | None = None) -> None:
        super().__init__("PLAN_INVALID", message, cure=cure)


class SettingsInvalid(InputError):
    """A flag, an environment variable or a line of a settings file is wrong."""

    def __init__(self, message: str, *, cure: str | None = None) -> None:
        super().__init__("SETTING_INVALID", message, cure=cure)


class DataInvalid(InputError):
    """A site's data can not be read as the plan says. Names file and line, never the content."""

    def __init__(self, message: str, *, cure: str | None = None) -> None:
        super().__init__("DATA_INVALID", message, cure=cure)


class ModelUnusable(InputError):
    """The base model is not at the site, or the plan's adapter does not fit it."""


class JoinFileInvalid(InputError):
    """A join file is unreadable, incomplete, or readable by others."""

    def __init__(self, message: str, *, cure: str | None = None) -> None:
        super().__init__("JOIN_FILE_INVALID", message, cure=cure)


class Refused(FsllmError):
    """The other end says no, with its reason; trying the same again does not help."""


class PolicyRefused(Refused):
    """The site's own policy does not allow what a plan asks."""


class UpdateRejected(Refused):
    """An upload was refused before it touched anything."""


class Unavailable(FsllmError):
    """The other end can not be reached, or a resource is exhausted; trying again may help."""


class TrainingFailed(FsllmError):
    """A trainer worker died, ran out of memory, or its loss is not a number."""
