"""Exporting over real TLS from a server that breaks off, sends rubbish, or ignores what it is asked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from control_harness import connected, credential
from safetensors.numpy import load_file

from fsllm.v1 import control_pb2_grpc
from fsllm.v1.control_pb2 import (
    RUN_STATUS_DONE,
    Commit,
    Contribution,
    ExportRunRequest,
    ExportRunResponse,
    GetServerRequest,
    GetServerResponse,
    MemberMetrics,
    Run,
    RunMember,
)
from fsllm.v1.federation_pb2 import Metric, Version
from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_BFLOAT16, Manifest
from fsllm_common.errors import FsllmError
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.philox import signs, stream
from fsllm_common.plan import canonical_json, plan_from_json
from fsllm_common.tensors.arrays import encode
from fsllm_common.tensors.chunks import CHUNK, read_chunks
from fsllm_operator.connection import Connection
from fsllm_operator.export import CARD, CONFIG, WEIGHTS, export_run

CONFIGURATION = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": None, "peft_version": "0.21.2"}


class Server(control_pb2_grpc.ControlServiceServicer):
    """Serves one version, and does what a test tells it to."""

    def __init__(self, manifest: Manifest, payload: Path) -> None:
        self.manifest = manifest
        self.payload = payload
        self.offsets: list[int] = []
        self.limit: Callable[[int], int] = lambda offset: -1
        """How many chunks a stream that begins at an offset sends before it breaks; -1: all."""
        self.damage = 0
        """So many streams to come have a flipped bit under a right checksum."""

    def ExportRun(  # noqa: N802 (the contract's name)
        self, request: ExportRunRequest, context: grpc.ServicerContext
    ) -> Iterator[ExportRunResponse]:
        manifest = Manifest()
        manifest.CopyFrom(self.manifest)
        if request.version != 0:
            manifest.adapter_config = ""
        yield ExportRunResponse(manifest=manifest)
        self.offsets.append(request.offset)
        limit = self.limit(request.offset)
        source = self.payload
        if self.damage and request.version:
            source = self.payload.with_suffix(".damaged")
            data = bytearray(self.payload.read_bytes())
            data[-1] ^= 1
            source.write_bytes(data)
        frames = list(read_chunks(source, request.offset))
        for at, frame in enumerate(frames):
            if at == limit:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            if source != self.payload and at == len(frames) - 1:
                self.damage -= 1  # before the client has the last byte, and begins its next stream
            yield ExportRunResponse.FromString(frame)

    def GetServer(  # noqa: N802
        self, request: GetServerRequest, context: grpc.ServicerContext
    ) -> GetServerResponse:
        return GetServerResponse(software_version="9.9.9")


@pytest.fixture
def arrays() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """About 2.5 chunks in bf16, of values that bf16 holds exactly."""
    generator = np.random.default_rng(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    return {
        name.format("A"): generator.integers(-128, 128, (4, 160_000)).astype(np.float32),
        name.format("B"): (generator.integers(-128, 128, (160_000, 4)) / 64).astype(np.float32),
    }


@pytest.fixture
def server(tmp_path: Path, arrays: dict[str, Any]) -> Server:
    payload = tmp_path / "payload"
    manifest = encode(arrays, ELEMENT_TYPE_BFLOAT16, payload, adapter_config=json.dumps(CONFIGURATION))
    return Server(manifest, payload)  # type: ignore[abstract]  # its other methods answer UNIMPLEMENTED


@pytest.fixture
def connection(tmp_path: Path, server: Server) -> Iterator[Connection]:
    with connected(tmp_path, server) as connection:
        yield connection


@pytest.fixture
def run(server: Server) -> Run:
    plan = plan_from_json(
        b'{"name": "letters", "rounds": 2, "model": {"name": "llama"}, "algorithm": {"weighting": "uniform"},'
        b'"pipeline": [{"stage": "clip", "norm": 0.5}, {"stage": "noise", "multiplier": 2}]}'
    )
    commits = [
        Commit(
            round=number,
            version=Version(number=number, digest=server.manifest.digest),
            contributions=[
                Contribution(member="north", payload_bytes=100, examples=11, tokens=101, weight=1.0)
                for _ in range(number > 0)
            ],
            metrics=[
                MemberMetrics(member="judge", role="evaluator", metrics=[Metric(name="loss", value=3.5 - number)])
            ],
        )
        for number in (0, 1, 2)
    ]
    return Run(
        run_id="abc123",
        name="letters",
        status=RUN_STATUS_DONE,
        rounds=2,
        commits=commits,
        members=[RunMember(name="north", role="site", epsilon=4.25, has_epsilon=True)],
        plan=canonical_json(plan),
    )


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsllm_operator.export.wait", lambda error: None)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check(folder: Path, arrays: dict[str, Any]) -> None:
    found = load_file(folder / WEIGHTS)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)


def test_a_method_says_what_the_adapter_is(tmp_path: Path, arrays: dict[str, Any]) -> None:
    """FedKSeed's version is version 0's adapter and how far it goes along each direction."""
    plan = plan_from_json(
        b'{"name": "letters", "rounds": 2, "seed": 3, "model": {"name": "llama"}, "algorithm": {"name": "fedkseed"},'
        b'"train": {"optimizer": "sgd", "max_grad_norm": 0, "learning_rate": 0.25}}'
    )
    payload = tmp_path / "payload"
    version = {**arrays, "scalars/coefficients": np.array([0, 8], np.float32)}
    manifest = encode(version, ELEMENT_TYPE_BFLOAT16, payload, adapter_config=json.dumps(CONFIGURATION))
    with connected(tmp_path, Server(manifest, payload)) as connection:  # type: ignore[abstract]
        commit = Commit(version=Version(number=0, digest=manifest.digest))
        run = Run(run_id="abc123", name="letters", commits=[commit], plan=canonical_json(plan))
        exported = export_run(connection, run, tmp_path / "adapter", force=False)
    key = (3 << 32) + 1
    moved = {name: array - 2 * signs(array.shape, key, stream(name)) for name, array in arrays.items()}
    check(tmp_path / "adapter", moved)
    assert exported.parameters == 1_280_000


def test_a_folder_that_peft_reads(connection: Connection, run: Run, arrays: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "adapter"
    exported = export_run(connection, run, folder, force=False)
    assert files(folder) == {WEIGHTS, CONFIG, CARD}
    check(folder, arrays)
    # The configuration came from version 0: only its manifest carries it.
    assert json.loads((folder / CONFIG).read_text()) == CONFIGURATION
    assert (exported.version, exported.tensors, exported.parameters) == (2, 2, 1_280_000)


def test_the_card_says_it_all(connection: Connection, run: Run, tmp_path: Path) -> None:
    export_run(connection, run, tmp_path / "out", 1, force=False)
    card = (tmp_path / "out" / CARD).read_text()
    assert card.startswith('---\nlibrary_name: peft\nbase_model: "llama"\n')
    for words in (
        "# letters",
        "| Version | 1 of 2 planned rounds",
        "fsllm 9.9.9 (server)",
        "peft 0.21.2",
        "| 0 | 0 | 0 | 0 B | 0.0 | - | 3.5000 |",
        "| 1 | 1 | 11 | 100 B | 0.0 | - | 2.5000 |",
        "| north | 1 | 11 | 101 | 4.25 |",
        "L2 norm of 0.5 and added Gaussian noise with multiplier 2",
        "PeftModel.from_pretrained(",
    ):
        assert words in card
    # Version 1 knows nothing of round 2.
    assert "| 2 | 1 |" not in card


@pytest.mark.usefixtures("no_waiting")
def test_a_broken_stream_goes_on_where_it_stood(
    connection: Connection, server: Server, run: Run, arrays: dict[str, Any], tmp_path: Path
) -> None:
    server.limit = lambda offset: 1
    export_run(connection, run, tmp_path / "out", force=False)
    check(tmp_path / "out", arrays)
    assert sorted({*server.offsets}) == [0, CHUNK, 2 * CHUNK]


@pytest.mark.usefixtures("no_waiting")
def test_what_arrived_is_not_fetched_again_by_the_next_command(
    connection: Connection, server: Server, run: Run, arrays: dict[str, Any], tmp_path: Path
) -> None:
    server.limit = lambda offset: 1 if offset == 0 else 0
    with pytest.raises(FsllmError) as caught:
        export_run(connection, run, tmp_path / "out", force=False)
    assert caught.value.reason == "SERVER_UNREACHABLE"
    assert files(tmp_path / "out") == {".partial"}
    server.limit = lambda offset: -1
    server.offsets.clear()
    export_run(connection, run, tmp_path / "out", force=False)
    assert CHUNK in server.offsets
    check(tmp_path / "out", arrays)


def test_a_wrong_payload_is_fetched_again(
    connection: Connection, server: Server, run: Run, arrays: dict[str, Any], tmp_path: Path
) -> None:
    server.damage = 1
    export_run(connection, run, tmp_path / "out", force=False)
    check(tmp_path / "out", arrays)


def test_a_payload_that_stays_wrong_is_refused(
    connection: Connection, server: Server, run: Run, tmp_path: Path
) -> None:
    server.damage = 99
    with pytest.raises(FsllmError) as caught:
        export_run(connection, run, tmp_path / "out", force=False)
    assert caught.value.reason == "DIGEST_MISMATCH"
    assert files(tmp_path / "out") == {".partial"}


def test_nothing_is_overwritten_without_force(
    connection: Connection, run: Run, arrays: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / CARD).write_text("my card")
    with pytest.raises(FsllmError, match=r"holds README\.md already"):
        export_run(connection, run, tmp_path, force=False)
    assert (tmp_path / CARD).read_text() == "my card"
    export_run(connection, run, tmp_path, force=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    check(tmp_path, arrays)


@pytest.mark.parametrize("version", [3, 99])
def test_a_version_that_is_not_there(connection: Connection, run: Run, tmp_path: Path, version: int) -> None:
    with pytest.raises(FsllmError, match=f"has no version {version}; it has 0 to 2") as caught:
        export_run(connection, run, tmp_path / "out", version, force=False)
    assert caught.value.reason == "VERSION_UNKNOWN"
    assert not (tmp_path / "out").exists()


def test_a_server_of_another_federation(connection: Connection, tmp_path: Path) -> None:
    """And what TLS says of it is made plain."""
    other = credential(CertificateAuthority.create(tmp_path / "other", "fed"))
    with Connection(connection.server, other) as stranger, pytest.raises(FsllmError) as caught:
        stranger.call(stranger.control.GetServer, GetServerRequest())
    assert caught.value.reason == "CERTIFICATE_UNTRUSTED"


def test_a_server_by_a_name_it_does_not_have(connection: Connection) -> None:
    address = connection.server.replace("localhost", "127.0.0.1")
    with Connection(address, connection.credential) as wrong, pytest.raises(FsllmError) as caught:
        wrong.call(wrong.control.GetServer, GetServerRequest())
    assert caught.value.reason == "CERTIFICATE_UNTRUSTED"
    assert "does not name the host" in caught.value.message
