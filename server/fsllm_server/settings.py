"""The server's settings: each is a flag, an environment variable and a line of the settings file."""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fsllm_common.identity.names import Role
from fsllm_common.settings import Settings
from fsllm_server.engine.retention import Retention

Port = Annotated[int, Field(ge=0, le=65535)]


def default_state_dir() -> Path:
    """Return systemd's state directory when it gives one, else the user's."""
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    own = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return Path(given) if given else own / "fsllm/server"


class ServerSettings(Settings):
    """Everything about one server that is not in its state folder."""

    port: Port = Field(default=50051, description="Where members and operators connect, with mutual TLS; 0: any free.")
    enrollment_port: Port | None = Field(
        default=None, description="Where newcomers redeem their join files; port + 1 when unset, 0: any free."
    )
    listen: str = Field(default="[::]", min_length=1, description="The address of both ports; [::] is every one.")
    metrics_port: Port = Field(default=9464, description="Of /metrics, /healthz and /readyz; 0: any free.")
    metrics_listen: str = Field(
        default="127.0.0.1", min_length=1, description="Its address. Whoever reaches it may read it: it has no log-in."
    )
    state_dir: Path = Field(
        default_factory=default_state_dir, description="The folder of everything the server keeps; made when missing."
    )
    host: tuple[str, ...] = Field(
        default=(),
        description="A name or address under which sites reach this server. All go into its certificate, the first "
        "into join files. May be given several times.",
    )
    federation: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="The federation's name, fixed by the first start: 'fsllm' when unset then.",
    )
    database: str | None = Field(
        default=None, description="URL of the database (SQLAlchemy's form); unset: an SQLite file in the state folder."
    )
    run: Path | None = Field(default=None, description="A plan file, submitted as a run at start.")
    uploads_at_once: PositiveInt = Field(
        default=4, description="Uploads that proceed at a time; the others queue. Each takes about 30 MiB of memory."
    )
    chunks_at_once: PositiveInt = Field(
        default=16,
        description="Chunks of 1 MiB that are on their way to members at a time, one a member; downloads take turns. "
        "Each takes about 3 MiB of memory.",
    )
    upload_stall_seconds: PositiveFloat = Field(
        default=60,
        description="An upload or download whose next chunk of 1 MiB takes longer loses its slot; it may come again.",
    )
    transfer_least_rate: float = Field(
        default=65536,
        ge=0,
        description="Bytes a second that a transfer must pass on average, after a grace of two stalls' time; else it "
        "loses its slot (TOO_SLOW), and goes on from its offset when it comes again. 0: any.",
    )
    max_connections: PositiveInt = Field(
        default=4096,
        description="Connections to the main port; more are closed at once. Each is an open file and about 60 KiB.",
    )
    calls_per_member: PositiveInt = Field(
        default=32, description="Calls in progress of one member; more get QUOTA_EXCEEDED. A daemon needs five."
    )
    calls_per_minute: PositiveInt = Field(
        default=6000,
        description="Calls of one member, a minute's worth at once; more get QUOTA_EXCEEDED. Upload counts for 4, "
        "Attach for 10, Renew for 60, and a refused call for 10 more.",
    )
    messages_per_second: PositiveFloat = Field(
        default=200, description="Messages of one member on Attach, 20 seconds' worth at once; more end the stream."
    )
    member_disk_bytes: PositiveInt = Field(
        default=64 << 30, description="Bytes of one site's uploads, unfinished and kept, on the server's disk."
    )
    join_attempts_per_minute: PositiveInt = Field(
        default=60, description="Join tokens that are refused, from one address; more are not looked at."
    )
    keepalive_seconds: float = Field(
        default=30,
        ge=1,
        le=3600,
        description="A silent connection is asked for a sign of life after so long, and closed when as long again "
        "passes without one. Not more than the sites'.",
    )
    keep_spools_rounds: NonNegativeInt = Field(
        default=3,
        description="The uploads of so many last committed rounds of each run are kept, so that `fsllm run verify` can "
        "recompute them. On disk: so many times the uploads of a round. 0: none.",
    )
    keep_spools_hours: NonNegativeFloat = Field(
        default=168, description="But none for longer than this after the commit of its round."
    )
    max_calls: PositiveInt = Field(
        default=4096, description="Calls in progress (each attached member is one); more get BUSY."
    )
    certificate_hours: PositiveFloat = Field(
        default=24, ge=0.02, le=24 * 366, description="Life of the daemons' certificates; renewed at two thirds."
    )
    operator_certificate_hours: PositiveFloat = Field(
        default=24 * 30,
        ge=0.02,
        le=24 * 366,
        description="Life of an invited operator's certificate, which no daemon renews: `fsllm` does, when it is used.",
    )
    stop_seconds: float = Field(default=10, ge=0, description="How long calls may take to end when the server stops.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least that is logged."
    )
    log_format: Literal["auto", "human", "json"] = Field(
        default="auto", description="auto: for people at a terminal, JSON elsewhere."
    )

    @property
    def certificate_life(self) -> timedelta:
        """Life of the certificates that daemons renew, the local operator's included."""
        return timedelta(hours=self.certificate_hours)

    @property
    def retention(self) -> Retention:
        """How long uploads outlive the commit of their round."""
        return Retention(self.keep_spools_rounds, self.keep_spools_hours * 3600)

    def life_of(self, role: Role) -> timedelta:
        """Return the life of a certificate that a member of ``role`` gets."""
        return timedelta(hours=self.operator_certificate_hours) if role is Role.OPERATOR else self.certificate_life

    @property
    def chosen_enrollment_port(self) -> int:
        """The enrolment port to open; 0 for any."""
        if self.enrollment_port is not None:
            return self.enrollment_port
        return self.port + 1 if 0 < self.port < 65535 else 0

    @property
    def public_host(self) -> str:
        """The name that join files carry."""
        return self.host[0] if self.host else socket.gethostname()

    @property
    def certificate_hosts(self) -> list[str]:
        """Every name of the server's certificate, the public one first."""
        # A host name that DNS does not allow (it may hold anything) can not stand in a certificate.
        own = [name for name in (socket.gethostname(),) if name and name.isascii()]
        listen = [] if self.listens_everywhere else [self.listen.strip("[]")]
        return list(dict.fromkeys((*self.host, *own, *listen, "localhost", "127.0.0.1", "::1")))

    @property
    def listens_everywhere(self) -> bool:
        """Whether loopback reaches it too."""
        return self.listen in ("[::]", "0.0.0.0")  # noqa: S104 - compared, not bound

    @property
    def local_host(self) -> str:
        """The name under which this very host reaches it."""
        return "localhost" if self.listens_everywhere else self.listen
