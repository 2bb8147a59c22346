"""The join file: what a newcomer needs to get its first certificate, carried by a person. One use, short life, 0600."""

import hashlib
import hmac
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from fsllm_common.errors import FsllmError, JoinFileInvalid
from fsllm_common.files import write_atomic
from fsllm_common.identity.names import Role

_MAX_FILE: Final = 65_536
_ID_BYTES: Final = 8
_SECRET_BYTES: Final = 32


class JoinFile(BaseModel):
    """The content of a join file, stored as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    version: int = Field(default=1, ge=1, le=1)
    federation: str
    role: Role
    name: str
    host: str = Field(min_length=1)
    port: int = Field(ge=1, le=65_535)
    enrollment_port: int = Field(ge=1, le=65_535)
    ca_certificate: str = Field(repr=False, pattern=r"^-----BEGIN CERTIFICATE-----")
    token: str = Field(repr=False, pattern=r"^[0-9a-f]+\.[A-Za-z0-9_-]+$")
    expires: AwareDatetime


def write_join_file(path: Path, join: JoinFile) -> None:
    """Write a join file that only its owner may read.

    Raises:
        FsllmError: DISK_FULL.

    """
    write_atomic(path, join.model_dump_json(indent=2).encode() + b"\n", mode=0o600)


def read_join_file(path: Path, now: datetime | None = None) -> JoinFile:
    """Read a join file.

    Raises:
        JoinFileInvalid: It is not there, others may read it, or it is not a join file.
        FsllmError: JOIN_TOKEN_EXPIRED.

    """
    try:
        if path.stat().st_mode & 0o077:
            raise JoinFileInvalid(
                f"{path} can be read or written by others than its owner",
                cure=f"Run `chmod 600 {path}`; if others may have read it, ask the operator for a new one.",
            )
        data = path.read_bytes()
    except OSError as error:
        raise JoinFileInvalid(
            f"{path}: {error.strerror}", cure="Give the path of the join file you received."
        ) from error
    try:
        if len(data) > _MAX_FILE:
            raise JoinFileInvalid(f"{path} is not a join file: it has {len(data)} bytes")
        join = JoinFile.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise JoinFileInvalid(f"{path} is not a join file: {where + ': ' if where else ''}{first['msg']}") from None
    if (now or datetime.now(UTC)) > join.expires:
        raise FsllmError("JOIN_TOKEN_EXPIRED", f"{path} expired at {join.expires:%Y-%m-%d %H:%M %Z}")
    return join


class Token(NamedTuple):
    """A new join token. The server keeps ``identifier`` and ``secret_hash`` only."""

    text: str
    identifier: str
    secret_hash: bytes


def make_token() -> Token:
    """Return a new token ``id.secret``. The secret has 256 random bits, so that a plain hash of it needs no salt."""
    identifier = secrets.token_hex(_ID_BYTES)
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    return Token(f"{identifier}.{secret}", identifier, _hash(secret))


def token_identifier(text: str) -> str:
    """Return the public part of a token, under which the server finds its record.

    Raises:
        FsllmError: JOIN_TOKEN_UNKNOWN: this is not a token.

    """
    identifier, dot, secret = text.partition(".")
    if not (dot and secret and len(identifier) == 2 * _ID_BYTES and len(text) <= 256 and text.isascii()):
        raise FsllmError("JOIN_TOKEN_UNKNOWN", "The join token is not one of this server's")
    return identifier


def token_matches(text: str, secret_hash: bytes) -> bool:
    """Tell whether a token's secret is the one that was hashed, in a time that does not depend on it."""
    return hmac.compare_digest(_hash(text.partition(".")[2]), secret_hash)


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
