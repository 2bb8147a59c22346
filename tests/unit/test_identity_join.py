import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fsllm_common.errors import FsllmError, JoinFileInvalid
from fsllm_common.identity.authority import CertificateAuthority
from fsllm_common.identity.join import (
    JoinFile,
    make_token,
    read_join_file,
    token_identifier,
    token_matches,
    write_join_file,
)
from fsllm_common.identity.names import Role


@pytest.fixture
def join(tmp_path: Path) -> JoinFile:
    return JoinFile(
        federation="lab",
        role=Role.SITE,
        name="hospital-a",
        host="server.example",
        port=50051,
        enrollment_port=50052,
        ca_certificate=CertificateAuthority.create(tmp_path / "ca", "lab").pem.decode(),
        token=make_token().text,
        expires=datetime.now(UTC) + timedelta(hours=1),
    )


def test_a_join_file_reads_back_and_is_its_owners_only(join: JoinFile, tmp_path: Path) -> None:
    path = tmp_path / "a.join"
    write_join_file(path, join)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_join_file(path) == join


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_join_file_that_others_may_read_is_refused_with_the_cure(join: JoinFile, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.join"
    write_join_file(path, join)
    path.chmod(mode)
    with pytest.raises(JoinFileInvalid) as caught:
        read_join_file(path)
    assert f"chmod 600 {path}" in caught.value.cure


def test_an_expired_join_file_says_so(join: JoinFile, tmp_path: Path) -> None:
    path = tmp_path / "a.join"
    write_join_file(path, join)
    with pytest.raises(FsllmError) as caught:
        read_join_file(path, datetime.now(UTC) + timedelta(hours=2))
    assert caught.value.reason == "JOIN_TOKEN_EXPIRED"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a join file"),
        (b"\xff\xfe", "not a join file"),
        (b"[]", "not a join file"),
        (b"{}", "required"),
        (b"x" * 100_000, "100000 bytes"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.join"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(JoinFileInvalid) as caught:
        read_join_file(path)
    assert words in caught.value.message


def test_a_missing_file_and_an_unknown_version_are_refused(join: JoinFile, tmp_path: Path) -> None:
    with pytest.raises(JoinFileInvalid, match="No such file"):
        read_join_file(tmp_path / "none")
    path = tmp_path / "a.join"
    write_join_file(path, join)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(JoinFileInvalid, match="version"):
        read_join_file(path)


def test_an_error_does_not_show_the_token(join: JoinFile, tmp_path: Path) -> None:
    path = tmp_path / "a.join"
    write_join_file(path, join)
    path.write_text(path.read_text().replace(join.token, join.token + "!"))
    with pytest.raises(JoinFileInvalid) as caught:
        read_join_file(path)
    secret = join.token.partition(".")[2]
    assert "token" in caught.value.message
    assert secret not in str(caught.value)
    assert secret not in repr(join)


def test_only_the_whole_token_matches_its_hash() -> None:
    token = make_token()
    assert token_identifier(token.text) == token.identifier
    assert token_matches(token.text, token.secret_hash)
    assert not token_matches(token.text[:-1], token.secret_hash)
    assert not token_matches(token.text + "A", token.secret_hash)
    assert not token_matches(make_token().text, token.secret_hash)
    assert token.text.partition(".")[2].encode() not in token.secret_hash
    assert len(token.secret_hash) == 32


def test_tokens_have_256_bits_and_never_repeat() -> None:
    tokens = [make_token() for _ in range(200)]
    assert len({t.identifier for t in tokens}) == len({t.text for t in tokens}) == 200
    assert all(len(t.text.partition(".")[2]) >= 43 for t in tokens)  # 256 bits in base 64


@pytest.mark.parametrize(
    "text", ["", ".", "abc", "0011223344556677", "0011223344556677.", "00.secret", "x" * 300, "é" * 16 + ".a"]
)
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(FsllmError) as caught:
        token_identifier(text)
    assert caught.value.reason == "JOIN_TOKEN_UNKNOWN"
