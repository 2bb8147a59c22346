"""Certificates for everybody, made once: the real guard reads who calls from them."""

import functools
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.keys import make_key, make_request
from fsllm_common.identity.names import Member, Role

FEDERATION = "simulated"


@dataclass(frozen=True)
class Identity:
    """What a link asks of a credential."""

    member: Member
    chain: bytes
    authority: bytes = b""


@functools.cache
def identity(role: Role, name: str) -> Identity:
    """Return the credential of a member."""
    member = Member(FEDERATION, role, name)
    return Identity(member, _authority().issue(make_request(make_key()), member, timedelta(days=300)))


@functools.cache
def _authority() -> CertificateAuthority:
    with tempfile.TemporaryDirectory() as folder:
        return CertificateAuthority.create(Path(folder) / "ca", FEDERATION)
