"""The settings of a site's daemon. Each stands as a flag, an environment variable, or a key of the settings file."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from fsllm_client.site.state import default_state_folder
from fsllm_client.trainer.cpu_adam import default_folder
from fsllm_common.settings import Settings


def _address(text: str) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError("a server is written host:port, e.g. fsllm.example.org:50051")
    return text


Address = Annotated[str, AfterValidator(_address)]
Port = Annotated[int, Field(ge=0, le=65535)]


class SiteSettings(Settings):
    """What every subcommand that looks at the site's state needs."""

    state_dir: Path = Field(
        default_factory=default_state_folder,
        description="Folder of the site's state: key, certificate, policy, ledger, results on their way. Also "
        "$STATE_DIRECTORY, as systemd sets it.",
    )
    policy: Path | None = Field(
        default=None,
        description="The site's policy file; policy.toml in the state folder when not given.",
    )


class DoctorSettings(SiteSettings):
    """What ``doctor`` looks at; what is not given is not tried."""

    server: Address | None = Field(default=None, description="The federation's server, host:port.")
    data: Path | None = Field(default=None, description="File or folder with the site's rows.")
    torch_extensions_dir: Path | None = Field(default=None, description="Where DeepSpeed keeps its compiled CPU Adam.")


class ClientSettings(SiteSettings):
    """What the daemon needs."""

    server: Address = Field(description="The federation's server, host:port.")
    data: Path = Field(description="File or folder with the site's rows (.jsonl, .json, .csv, .parquet, .txt).")
    join: Path | None = Field(default=None, description="Join file from the operator; needed the first time only.")
    ranks: PositiveInt | None = Field(
        default=None, description="Trainer processes, one a GPU; the number of GPUs, or 1, when not given."
    )
    deepspeed_config: Path | None = Field(
        default=None, description="The site's own DeepSpeed JSON, in place of the plan's deepspeed section."
    )
    trainer_threads: PositiveInt | None = Field(
        default=None, description="CPU threads of each trainer process; the cores divided by the ranks when not given."
    )
    torch_extensions_dir: Path | None = Field(
        default=None,
        description="Where DeepSpeed keeps its compiled CPU Adam; when not given, the virtual environment that `make` "
        "built it in, or the user's cache.",
    )
    keepalive_seconds: float = Field(
        default=30,
        ge=1,
        le=3600,
        description="A silent connection to the server is tried after so long, and given up when as long again "
        "passes without an answer. Not less than the server's.",
    )
    metrics_listen: str = Field(default="127.0.0.1", description="Address of /metrics, /healthz and /readyz.")
    metrics_port: Port | None = Field(
        default=None, description="Port of /metrics, /healthz and /readyz; 0: a free one; not given: not served."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least that is logged."
    )
    log_format: Literal["auto", "human", "json"] = Field(
        default="auto", description="auto: for people at a terminal, one JSON object a line elsewhere."
    )


def extensions_folder(given: Path | None) -> Path | None:
    """Return where DeepSpeed's compiled operators lie; None for a service, which keeps them in its state folder."""
    if given is not None:
        return given
    if variable := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(variable)
    return None if os.environ.get("STATE_DIRECTORY") else default_folder()
