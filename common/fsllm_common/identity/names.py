"""Who a member is: a federation, a role and a name, written as a SPIFFE-style URI in the certificate."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fsllm_common.errors import FsllmError, InputError

_URI: Final = re.compile(r"spiffe://([^/]*)/([^/]*)/([^/]*)")
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Role(StrEnum):
    """What a certificate entitles to."""

    SITE = "site"
    EVALUATOR = "evaluator"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a federation, as its certificate names it."""

    federation: str
    role: Role
    name: str

    @property
    def uri(self) -> str:
        """``spiffe://<federation>/<role>/<name>``."""
        return f"spiffe://{self.federation}/{self.role}/{self.name}"

    @classmethod
    def of(cls, federation: str, role: str, name: str) -> "Member":
        """Make a member from words that a person or a peer gave.

        Raises:
            FsllmError: NAME_INVALID: one of them is not a name, or the role is unknown.

        """
        if role not in list(Role):
            raise InputError("NAME_INVALID", f"Unknown role {role[:80]!r}", cure=f"Roles are {', '.join(Role)}.")
        return cls(check_name(federation, "federation"), Role(role), check_name(name, role))

    @classmethod
    def parse(cls, uri: str) -> "Member":
        """Read the URI of a certificate.

        Raises:
            FsllmError: IDENTITY_MISSING: it is not such a URI.

        """
        parts = _URI.fullmatch(uri)
        try:
            return cls.of(*(parts.groups() if parts else ("", "", "")))
        except FsllmError as error:
            raise FsllmError("IDENTITY_MISSING", f"The certificate's URI {uri[:200]!r} names no member") from error


def check_name(name: str, what: str = "member") -> str:
    """Return ``name`` when it is one.

    Raises:
        FsllmError: NAME_INVALID.

    """
    if not _NAME.fullmatch(name):
        raise InputError("NAME_INVALID", f"{name[:80]!r} is not a valid {what} name")
    return name
