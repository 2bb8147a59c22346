"""Flower: a SuperLink and SuperNodes with TLS, the run submitted by its own command."""

import shutil
import socket
import ssl
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from fsllm_bench.peers.environment import (
    APPS,
    TENSORS,
    Environment,
    Outcome,
    descendants,
    peak_memory,
    process,
    round_ends,
)
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.keys import make_key, make_request

VERSION: Final = "1.41.0"
_READY_SECONDS: Final = 180.0

_PROJECT: Final = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "rounds"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"

[tool.flwr.app.config]
mebibytes = {mebibytes:.3f}
tensors = {tensors}
sites = {sites}
rounds = {rounds}
times = "{times}"
"""

_CONNECTION: Final = """[superlink]
default = "bench"

[superlink.bench]
address = "localhost:{port}"
root-certificates = "{certificates}"
"""


def measure(root: Path, mebibytes: float, sites: int, rounds: int) -> Outcome:
    """Run so many rounds of FedAvg over made-up arrays."""
    here = Environment(root, "flwr", VERSION)
    place = here.work / "run"
    shutil.rmtree(place, ignore_errors=True)
    app, home = place / "app", place / "home"
    for folder in (app, home):
        folder.mkdir(parents=True)
    times = place / "times"
    shutil.copy(APPS / "flower_app.py", app)
    (app / "pyproject.toml").write_text(
        _PROJECT.format(mebibytes=mebibytes, tensors=TENSORS, sites=sites, rounds=rounds, times=times)
    )
    root_certificate, tls = _certificates(place)
    port = _free_port()
    (home / "config.toml").write_text(_CONNECTION.format(port=port, certificates=root_certificate))
    variables = here.variables(FLWR_HOME=str(home), FLWR_TELEMETRY_ENABLED="0")
    with ExitStack() as stack:
        link = [
            here.command("flower-superlink"),
            "--disable-runtime-dependency-installation",
            *tls,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        server = stack.enter_context(process(link, place / "superlink.log", variables))
        peak = stack.enter_context(peak_memory(lambda: descendants(server)))
        _await_tls(port, root_certificate)
        for number in range(sites):
            node = [
                here.command("flower-supernode"),
                *("--superlink", f"localhost:{port}", "--root-certificates", str(root_certificate)),
                *("--host", "127.0.0.1", "--port", str(_free_port()), *tls),
            ]
            stack.enter_context(process(node, place / f"supernode-{number}.log", variables))
        done = subprocess.run(
            [here.command("flwr"), "run", str(app), "bench", "--stream"],
            env=variables,
            check=False,
            capture_output=True,
            text=True,
        )
        ends = round_ends(times) if times.exists() else []
        if len(ends) < rounds:
            raise SystemExit(f"flwr run did {len(ends)} of {rounds} rounds: {done.stdout[-2000:]} {done.stderr[-500:]}")
        return Outcome(ends, peak())


def _certificates(folder: Path) -> tuple[Path, list[str]]:
    """Make an authority and a certificate for localhost; return the one's file and the options that name both."""
    authority = CertificateAuthority.create(folder, "bench")
    key = make_key()
    files = {
        "ca.pem": authority.pem,
        "key.pem": key,
        "cert.pem": authority.issue_server(make_request(key), ["localhost", "127.0.0.1"]),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    options = {"--ssl-ca-certfile": "ca.pem", "--ssl-certfile": "cert.pem", "--ssl-keyfile": "key.pem"}
    return folder / "ca.pem", [part for name, file in options.items() for part in (name, str(folder / file))]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _await_tls(port: int, authority: Path) -> None:
    context = ssl.create_default_context(cafile=str(authority))
    until = time.monotonic() + _READY_SECONDS
    while True:
        try:
            with (
                socket.create_connection(("127.0.0.1", port)) as raw,
                context.wrap_socket(raw, server_hostname="localhost"),
            ):
                return
        except OSError:
            if time.monotonic() > until:
                raise
            # It says nowhere when it listens.
            time.sleep(0.5)
