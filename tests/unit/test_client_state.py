"""The site's private state: the lock, the outbox, the book of runs, the digest of a model."""

from pathlib import Path

import pytest
from blake3 import blake3

from fsllm.v1.federation_pb2 import UploadBegin
from fsllm.v1.tensors_pb2 import Manifest
from fsllm_client.site.model import check_model_digest, model_digest
from fsllm_client.site.outbox import Outbox, Parcel
from fsllm_client.site.runs import RunBook
from fsllm_client.site.state import LAYOUT, StateFolder, default_state_folder
from fsllm_common.errors import FsllmError, ModelUnusable, Refused, SettingsInvalid
from fsllm_common.layout import FILE
from fsllm_common.plan import Plan

PLAN = Plan.model_validate({"name": "ward", "model": {"name": "m"}})


def test_the_state_folder_is_the_owners_alone_and_one_daemons(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    assert {path.stat().st_mode & 0o777 for path in (state.root, *state.root.iterdir())} == {0o700, 0o600}
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in (state.root, *state.root.iterdir()) if path.is_dir())
    assert state.daemon_pid() is None
    state.lock()
    with pytest.raises(FsllmError) as caught:
        StateFolder(tmp_path / "state").lock()
    assert caught.value.reason == "STATE_LOCKED"
    assert state.daemon_pid() is not None
    state.unlock()
    assert state.daemon_pid() is None
    StateFolder(tmp_path / "state").lock().unlock()


def test_looking_at_a_state_folder_makes_none(tmp_path: Path) -> None:
    for folder in (tmp_path / "mistyped", tmp_path):
        with pytest.raises(SettingsInvalid, match="is not the state folder of a site"):
            StateFolder.existing(folder)
    assert not list(tmp_path.iterdir())
    StateFolder(tmp_path / "state")
    assert StateFolder.existing(tmp_path / "state").runs.is_dir()


def test_a_state_folder_of_a_newer_fsllm_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "state"
    state = StateFolder(root)
    assert (root / FILE).read_text() == f"{LAYOUT.newest}\n"
    (root / FILE).write_text(f"{LAYOUT.newest + 1}\n")
    (root / "outbox").rmdir()
    for refused in (lambda: StateFolder(root), lambda: StateFolder.existing(root), state.lock):
        with pytest.raises(FsllmError) as newer:
            refused()
        assert newer.value.reason == "STATE_NEWER"
    assert not (root / "outbox").exists()
    # The refused start has not kept the folder; and what 0.1.0 left, which wrote no number, is carried on.
    (root / FILE).unlink()
    StateFolder(root).lock().unlock()
    assert (root / FILE).read_text() == "1\n"


def test_a_state_folder_that_is_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a volume of Kubernetes is: root's and open to a group, but writable. What lies in it is closed."""
    root = tmp_path / "state"
    root.mkdir(mode=0o775)
    root.chmod(0o775)
    allowed = Path.chmod

    def chmod(path: Path, mode: int) -> None:
        if path in forbidden:
            raise PermissionError(1, "Operation not permitted")
        allowed(path, mode)

    forbidden = {root}
    monkeypatch.setattr(Path, "chmod", chmod)
    state = StateFolder(root)
    assert state.identity.stat().st_mode & 0o777 == 0o700
    allowed(state.identity, 0o750)
    StateFolder(root)
    assert state.identity.stat().st_mode & 0o777 == 0o700
    allowed(state.identity, 0o750)
    forbidden.add(state.identity)
    with pytest.raises(SettingsInvalid, match="can not be used: Operation not permitted"):
        StateFolder(root)


def test_where_the_state_lies_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FSLLM_STATE_DIR", "STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_state_folder() == Path.home() / ".local/state/fsllm/client"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/a:/var/lib/b")
    assert default_state_folder() == Path("/var/lib/a")
    monkeypatch.setenv("FSLLM_STATE_DIR", str(tmp_path))
    assert default_state_folder() == tmp_path


def fill(outbox: Outbox, run: str, round_: int, base: bytes, content: bytes = b"payload") -> Parcel:
    outbox.prepare(run, round_, base).write_bytes(content)
    begin = UploadBegin(run_id=run, round=round_, base_digest=base, manifest=Manifest(digest=b"d" * 32))
    return outbox.commit(begin)


def test_a_parcel_counts_from_its_commit_and_survives_a_restart(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.prepare("r", 1, b"base").write_bytes(b"half")
    assert outbox.find("r", 1, b"base") is None
    fill(outbox, "r", 2, b"base")
    outbox = Outbox(tmp_path)
    found = outbox.find("r", 2, b"base")
    assert found is not None
    assert found.payload.read_bytes() == b"payload"
    assert found.begin.round == 2
    assert [path.name.split(".")[1] for path in tmp_path.iterdir()] == ["2"], "what was half written is gone"


def test_a_parcel_answers_only_its_own_run_round_and_base(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    fill(outbox, "r", 2, b"base-one")
    assert outbox.find("r", 2, b"base-two") is None
    assert outbox.find("r", 3, b"base-one") is None
    assert outbox.find("s", 2, b"base-one") is None
    assert outbox.find("r", 2, b"") is None


def test_earlier_rounds_of_a_run_are_forgotten_and_others_kept(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for run, round_ in (("r", 1), ("r", 9), ("r", 10), ("r1", 1)):
        fill(outbox, run, round_, b"base")
    outbox.remove_before("r", 10)
    held = [(run, n) for run in ("r", "r1") for n in (1, 9, 10) if outbox.find(run, n, b"base") is not None]
    assert held == [("r", 10), ("r1", 1)]
    outbox.prepare("s", 1, b"base").write_bytes(b"half")
    assert [(parcel.begin.run_id, parcel.begin.round) for parcel in outbox.all()] == held
    last = outbox.find("r", 10, b"base")
    assert last is not None
    outbox.remove(last)
    assert outbox.find("r", 10, b"base") is None


def test_a_run_waits_until_a_person_accepts_it(tmp_path: Path) -> None:
    book = RunBook(tmp_path)
    book.note("abc1", PLAN, "joined")
    book.note("abd2", PLAN, "waiting")
    assert not book.is_accepted("abd2")
    with pytest.raises(Refused, match="No run fits 'x'"):
        book.accept("x")
    assert book.accept("ward").run_id == "abd2", "by name, the one that waits"
    assert book.is_accepted("abd2")
    assert not book.is_accepted("abc1")
    assert Plan.model_validate_json(book.plan("abd2").read_bytes()) == PLAN
    book.note("abd2", PLAN, "joined")
    with pytest.raises(Refused, match="abc1, abd2"):
        book.accept("ab")


def test_a_run_id_leads_nowhere_else(tmp_path: Path) -> None:
    for bad in ("../x", "a/b", "", ".", "a" * 200):
        with pytest.raises(Refused):
            RunBook(tmp_path / "runs").note(bad, PLAN, "joined")
    assert list(tmp_path.iterdir()) == []


def test_a_models_digest_is_of_its_weights_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "pytorch_model.bin").write_bytes(b"another format of the same")
    expected = blake3()
    for name, content in (("a.safetensors", b"one"), ("b.safetensors", b"two")):
        expected.update(name.encode() + b"\0" + len(content).to_bytes(8, "little") + content)
    assert model_digest(tmp_path) == expected.hexdigest()
    (tmp_path / "config.json").write_text("{}")
    check_model_digest(tmp_path, expected.hexdigest())
    (tmp_path / "a.safetensors").write_bytes(b"onE")
    with pytest.raises(ModelUnusable, match="digest"):
        check_model_digest(tmp_path, expected.hexdigest())
    with pytest.raises(ModelUnusable, match="holds no weights"):
        model_digest(tmp_path / "nowhere")
