"""The checks of `fsllm-client doctor`: what a run needs, one by one, each with what to do."""

import asyncio
import shutil
import stat
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import grpc

from fsllm_client.settings import DoctorSettings, extensions_folder
from fsllm_client.site.machine import Machine
from fsllm_client.site.policy import EMBEDDED, Policy
from fsllm_client.site.state import StateFolder
from fsllm_common.errors import REASONS, FsllmError
from fsllm_common.identity.credentials import CHANNEL_OPTIONS, channel_credentials
from fsllm_common.identity.keys import Certificate, Credential, check_credential, load_credential
from fsllm_common.identity.probe import knock
from fsllm_common.plan.schema import Data
from fsllm_common.rpc_errors import error_from

Outcome = Literal["ok", "warning", "failed"]

LEAST_DISK: Final = 2 << 30
"""Bytes: versions, results on their way, optimizer state of a small adapter."""
CALL_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    outcome: Outcome
    message: str
    cure: str = ""
    reason: str = ""

    @property
    def exit_code(self) -> int:
        """The exit code when this is the first that failed."""
        return REASONS[self.reason].exit if self.reason else 1


def _failed(name: str, error: FsllmError, outcome: Outcome = "failed") -> Check:
    return Check(name, outcome, error.message, error.cure, error.reason)


async def examine(settings: DoctorSettings) -> list[Check]:
    """Run every check; a failure of one does not stop the others."""
    checks: list[Check] = []
    state = StateFolder(settings.state_dir, make=False)
    checks.append(_state(state))
    checks.append(_disk(state))
    credential, check = _credential(state)
    checks.append(check)
    checks += await _server(settings.server, credential)
    policy, check = _policy(settings.policy or state.policy)
    checks.append(check)
    machine = Machine.look()
    checks += [_stack(machine), _gpu(machine), _compiler(settings, machine)]
    if policy is not None:
        checks += _models(policy)
    checks.append(await asyncio.to_thread(_data, settings.data))
    return checks


def _state(state: StateFolder) -> Check:
    if not state.root.is_dir():
        return Check("state folder", "warning", f"{state.root} is not there yet", "The daemon makes it.")
    try:
        state.demand_known()
    except FsllmError as error:
        return _failed("state folder", error)
    mode = stat.S_IMODE(state.root.stat().st_mode)
    pid = state.daemon_pid()
    who = f"; the daemon runs as process {pid}" if pid is not None else "; no daemon runs"
    return Check("state folder", "ok", f"{state.root} ({mode:04o}){who}")


def _disk(state: StateFolder) -> Check:
    there = next(folder for folder in (state.root, *state.root.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 2**30:.1f} GiB free in {state.root}"
    if free >= LEAST_DISK:
        return Check("disk", "ok", text)
    return Check("disk", "failed", text, f"Free space: {LEAST_DISK >> 30} GiB are the least to work with.", "DISK_FULL")


def _credential(state: StateFolder) -> tuple[Credential | None, Check]:
    try:
        credential = load_credential(state.identity)
        check_credential(credential)
    except FsllmError as error:
        return None, _failed("certificate", error)
    certificate = credential.certificate
    times = (certificate.not_before, certificate.not_after, certificate.renew_at)
    start, end, renewal = (f"{time:%Y-%m-%d %H:%M}" for time in times)
    message = f"{certificate.uri}, valid {start} to {end} UTC, renewed from {renewal} UTC"
    return credential, Check("certificate", "ok", message)


async def _server(server: str | None, credential: Credential | None) -> list[Check]:
    if server is None:
        return [Check("server", "warning", "not tried: no --server", "Give --server HOST:PORT.")]
    if credential is None:
        host, _, port = server.rpartition(":")
        try:
            async with asyncio.timeout(CALL_SECONDS):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
        except OSError as error:
            unreachable = FsllmError("SERVER_UNREACHABLE", f"{server}: {error.strerror or 'no answer'}")
            return [_failed("server", unreachable)]
        return [Check("server", "warning", f"{server} accepts connections; TLS is not tried without a certificate")]
    try:
        certificate = await asyncio.to_thread(knock, server, credential.authority, credential)
    except FsllmError as error:
        return [_failed("server", error)]
    return [
        Check("server", "ok", f"{server} answers by TLS as this federation's"),
        _clock(certificate),
        await _membership(server, credential),
    ]


def _clock(certificate: Certificate) -> Check:
    """The server's certificate is young: a clock far from the server's lies outside its time."""
    now = datetime.now(UTC)
    span = f"{certificate.not_before:%Y-%m-%d %H:%M} to {certificate.not_after:%Y-%m-%d %H:%M} UTC"
    message = f"{now:%Y-%m-%d %H:%M} UTC here; the server's certificate is valid {span}"
    if certificate.not_before <= now <= certificate.not_after:
        return Check("clock", "ok", message)
    return Check("clock", "failed", message, "Set this host's clock right.", "CERTIFICATE_EXPIRED")


async def _membership(server: str, credential: Credential) -> Check:
    """Ask for the server's health under our own identity."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # needed by this command only

    async with grpc.aio.secure_channel(server, channel_credentials(credential), options=CHANNEL_OPTIONS) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            return _failed("membership", error_from(error, server))
    return Check("membership", "ok", f"the server serves {credential.member.name} ({credential.member.role})")


def _policy(path: Path) -> tuple[Policy | None, Check]:
    if not path.exists():
        return Policy(), Check("policy", "ok", f"{path} is not there: the defaults hold, and the daemon will write it")
    try:
        policy = Policy.read(path)
    except FsllmError as error:
        return None, _failed("policy", error)
    how = "accepted automatically" if policy.accept.automatic else "accepted by a person"
    return policy, Check("policy", "ok", f"{path}: runs are {how}")


def _stack(machine: Machine) -> Check:
    if machine.missing:
        missing = FsllmError("TRAINER_MISSING", f"not installed: {', '.join(machine.missing)}")
        return _failed("training stack", missing)
    return Check("training stack", "ok", "torch, transformers, peft, deepspeed and opacus are installed")


def _gpu(machine: Machine) -> Check:
    if machine.gpus:
        names = ", ".join(f"{count} x {name}" for name, count in Counter(machine.gpu_names).items())
        return Check("GPU", "ok", f"{names}, {machine.gpu_memory_bytes / 2**30:.0f} GiB each at least")
    return Check(
        "GPU", "warning", "none found: training runs on the CPU", "Check `nvidia-smi` where there should be one."
    )


def _compiler(settings: DoctorSettings, machine: Machine) -> Check:
    from fsllm_client.trainer.cpu_adam import is_built

    folder = extensions_folder(settings.torch_extensions_dir) or (
        StateFolder(settings.state_dir, make=False).trainer / "extensions"
    )
    if is_built(folder):
        return Check("CPU Adam", "ok", f"compiled in {folder}")
    compiler = next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)
    build = "Run `python -m fsllm_client.trainer.cpu_adam` now, so that the first round need not wait for it."
    if compiler is not None:
        return Check("CPU Adam", "warning", f"not compiled in {folder} yet; {compiler} will do it, in minutes", build)
    outcome: Outcome = "warning" if machine.missing else "failed"
    cure = "Install g++ and ninja."
    return Check(
        "CPU Adam", outcome, f"not compiled in {folder}, and there is no C++ compiler", cure, "TRAINER_MISSING"
    )


def _models(policy: Policy) -> list[Check]:
    from fsllm_client.trainer.base_model import check_folder

    checks = []
    for name in sorted({*policy.models, EMBEDDED}):
        try:
            folder = policy.model_folder(name)
            if folder is not None:
                check_folder(folder)
        except FsllmError as error:
            # Nobody has asked for the embedded model here.
            checks.append(_failed(f"model {name}", error, "failed" if name in policy.models else "warning"))
        else:
            checks.append(Check(f"model {name}", "ok", str(folder)))
    return checks


def _data(path: Path | None) -> Check:
    if path is None:
        return Check("data", "warning", "not read: no --data", "Give --data PATH.")
    from fsllm_client.data.readers import read_rows
    from fsllm_client.data.rows import FieldsUnknown

    try:
        rows = read_rows(path, Data())
    except FieldsUnknown as error:
        # Nothing is wrong with the data: what they are called is for the plan to say.
        return Check("data", "warning", error.message, error.cure)
    except FsllmError as error:
        return _failed("data", error)
    counts = Counter(example.place.file for example in rows.examples)
    empty = Counter(example.place.file for example in rows.examples if example.reference == "")
    files = [
        f"{file.name} {count} rows" + (f" ({empty[file]} without an answer: skipped)" if empty[file] else "")
        for file, count in sorted(counts.items())
    ]
    return Check("data", "ok", "; ".join([*files, *rows.notes]))


def exit_code(checks: list[Check]) -> int:
    """Return 0 when nothing failed, else the exit code of the first failure."""
    return next((check.exit_code for check in checks if check.outcome == "failed"), 0)
