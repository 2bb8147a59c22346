"""Which server an operator talks to, and with which credential: named, of a server on this host, or from a login."""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fsllm.v1.federation_pb2 import RenewRequest
from fsllm_common.errors import FsllmError, SettingsInvalid, Unavailable
from fsllm_common.identity.keys import (
    accept_chain,
    check_credential,
    load_credential,
    make_key,
    make_request,
    save_credential,
)
from fsllm_common.identity.probe import why_unreachable
from fsllm_operator.connection import Connection

SERVER_FILE: Final = "server.json"
"""Beside a credential: which server it is for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where to connect, and with what."""

    server: str
    """host:port."""
    folder: Path
    """Holds credential.pem."""
    local: bool = False
    """The credential is of a server on this host, which renews it itself."""

    def probe(self) -> FsllmError | None:
        """Return what stands between us and the server; None when it would talk to us. Takes seconds at worst."""
        return why_unreachable(self.server, self.folder)


def login_folder() -> Path:
    """Return where `fsllm login` keeps its credential."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "fsllm" / "operator"


def discover(server: str | None, credential: Path | None) -> Place:
    """Return the server and credential to use; what is given outranks what is found.

    Raises:
        FsllmError: NOT_ENROLLED: there is no credential anywhere. SERVER_UNREACHABLE: a server's on this host, which
            does not run. SETTING_INVALID: the address is none.

    """
    candidates = [credential] if credential else [*local_folders(), login_folder()]
    silent: Path | None = None
    for folder in candidates:
        if _is_credential(folder):
            address = server or _address(folder)
            if address is not None:
                return Place(_checked(address), folder, local=credential is None and folder != login_folder())
            silent = silent or folder
    if silent is not None:
        raise Unavailable(
            "SERVER_UNREACHABLE",
            f"The server that keeps its state in {silent.parent} is not running",
            cure="Start fsllm-server, or give --server HOST:PORT.",
        )
    raise FsllmError(
        "NOT_ENROLLED",
        f"No operator's credential in {', '.join(map(str, candidates))}",
        cure="On the server's host, run as the user that started fsllm-server. Elsewhere, get a join file "
        "(`fsllm operator invite NAME -o FILE` on the server's host) and run `fsllm login --join FILE`.",
    )


def connect(place: Place) -> Connection:
    """Return a connection; a login's credential is renewed first when two thirds of its life are over.

    Raises:
        FsllmError: The credential is damaged, expired or of another federation.

    """
    credential = load_credential(place.folder)
    check_credential(credential)
    if place.local or datetime.now(UTC) < credential.certificate.renew_at:
        return Connection(place.server, credential)
    with Connection(place.server, credential) as connection:
        key = make_key()
        answer = connection.call(connection.federation.Renew, RenewRequest(csr=make_request(key)))
    credential = accept_chain(key, answer.certificate_chain, credential.authority)
    save_credential(place.folder, credential)
    return Connection(place.server, credential)


def local_folders() -> list[Path]:
    """Return where a server on this host would keep its operator's credential, as a user and under systemd."""
    given = os.environ.get("FSLLM_STATE_DIR")
    states = [Path(given)] if given else [Path.home() / ".local/state/fsllm/server", Path("/var/lib/fsllm-server")]
    return [state / "operator" for state in states]


def _is_credential(folder: Path) -> bool:
    """Tell whether a folder holds a credential; one that we may not look into is another user's."""
    try:
        return (folder / "credential.pem").is_file()
    except PermissionError:
        return False


def _address(folder: Path) -> str | None:
    # A login keeps the address beside its credential; a server keeps it in its state folder, while it serves.
    for path in (folder / SERVER_FILE, folder.parent / SERVER_FILE):
        try:
            address = json.loads(path.read_text(encoding="utf-8"))["server"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsInvalid(f"{path} can not be read", cure="Give --server HOST:PORT.") from error
        return str(address)
    return None


def _checked(server: str) -> str:
    host, colon, port = server.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65_536):
        raise SettingsInvalid(
            f"--server {server!r} is not HOST:PORT", cure="For example: --server fed.example.org:50051"
        )
    return server
