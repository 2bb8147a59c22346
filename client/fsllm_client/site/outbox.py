"""Results that the server has not acknowledged: on disk before the first byte is sent.

A parcel is a folder with the payload and, written last, the announcement (UploadBegin). It is found again by run,
round and base version, so an order that comes again, under its old id or a new one, is answered with the same bytes:
nothing is trained twice, and a noised delta is not released twice.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from fsllm.v1.federation_pb2 import UploadBegin
from fsllm_client.site.state import DIRECTORY_MODE, FILE_MODE
from fsllm_common.errors import FsllmError
from fsllm_common.files import disk_errors, sync_folder, write_atomic
from fsllm_common.telemetry.logs import get_logger

log = get_logger()

_BEGIN: Final = "begin.pb"
_PAYLOAD: Final = "payload"


@dataclass(frozen=True, slots=True)
class Parcel:
    """A result that is ready to be sent."""

    folder: Path
    begin: UploadBegin

    @property
    def payload(self) -> Path:
        """The payload file, as its manifest describes it."""
        return self.folder / _PAYLOAD

    @property
    def digest(self) -> bytes:
        """The payload's digest."""
        return self.begin.manifest.digest


class Outbox:
    """The folder of parcels."""

    def __init__(self, root: Path) -> None:
        """Drop what a crash left half written."""
        self.root = root
        root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        for folder in root.iterdir():
            if not (folder / _BEGIN).is_file():
                shutil.rmtree(folder)

    def all(self, run_id: str | None = None) -> list[Parcel]:
        """Return every parcel, or every one of a run.

        Raises:
            FsllmError: STATE_CORRUPT.

        """
        folders = sorted(self.root.iterdir() if run_id is None else self.root.glob(f"{run_id}.*"))
        return [parcel for folder in folders if (parcel := _read(folder)) is not None]

    def find(self, run_id: str, round_: int, base_digest: bytes) -> Parcel | None:
        """Return the parcel for a run's round, if it is there.

        Raises:
            FsllmError: STATE_CORRUPT.

        """
        return _read(self.root / _name(run_id, round_, base_digest))

    def prepare(self, run_id: str, round_: int, base_digest: bytes) -> Path:
        """Make an empty folder for a parcel and return where its payload goes."""
        folder = self.root / _name(run_id, round_, base_digest)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=DIRECTORY_MODE)
        return folder / _PAYLOAD

    def abandon(self, run_id: str, round_: int, base_digest: bytes) -> None:
        """Remove what was written of a parcel that did not come about."""
        shutil.rmtree(self.root / _name(run_id, round_, base_digest), ignore_errors=True)

    def commit(self, begin: UploadBegin, *, durable: bool = True) -> Parcel:
        """Make the parcel count, now that its payload is written and synced.

        Args:
            begin: The announcement, with the payload's manifest.
            durable: False where making the payload anew costs nothing (the noop algorithm): nothing is synced.

        Raises:
            Unavailable: DISK_FULL, DISK_FAILED.

        """
        folder = self.root / _name(begin.run_id, begin.round, begin.base_digest)
        with disk_errors(self.root):
            if durable:
                write_atomic(folder / _BEGIN, begin.SerializeToString(), mode=FILE_MODE)
                sync_folder(self.root)
            else:
                fresh = folder / f".{_BEGIN}"
                fresh.write_bytes(begin.SerializeToString())
                fresh.rename(folder / _BEGIN)
        log.info("made, and kept until it is acknowledged", digest=begin.manifest.digest.hex()[:12])
        return Parcel(folder, begin)

    def remove(self, parcel: Parcel) -> None:
        """Forget a parcel that was acknowledged or refused."""
        # The announcement first: a crash in between leaves a folder that counts for nothing.
        (parcel.folder / _BEGIN).unlink(missing_ok=True)
        shutil.rmtree(parcel.folder, ignore_errors=True)

    def remove_before(self, run_id: str, round_: int) -> None:
        """Forget a run's parcels of earlier rounds, which nobody will ask for again."""
        for folder in self.root.glob(f"{run_id}.*"):
            number = folder.name[len(run_id) + 1 :].split(".")[0]
            if number.isdigit() and int(number) < round_:
                self.remove(Parcel(folder, UploadBegin()))


def _read(folder: Path) -> Parcel | None:
    try:
        begin = UploadBegin.FromString((folder / _BEGIN).read_bytes())
    except FileNotFoundError:
        return None
    except DecodeError as error:
        raise FsllmError("STATE_CORRUPT", f"{folder / _BEGIN} is no announcement of an upload") from error
    return Parcel(folder, begin)


def _name(run_id: str, round_: int, base_digest: bytes) -> str:
    return f"{run_id}.{round_}.{base_digest[:8].hex() or 'build'}"
