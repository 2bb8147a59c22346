"""Files and folders become examples; whatever is wrong is named by file and line, and never quoted."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fsllm_client.data.readers import Rows, read_rows
from fsllm_common.errors import DataInvalid, InputError
from fsllm_common.plan.schema import Data

Write = Callable[[Path, list[dict[str, Any]]], None]

AUTO = Data()
PRIVATE = "Jane Doe"
ROWS = [
    {"instruction": "Add, then say why.", "input": "1 and 2", "output": 'It is "3",\nby counting.'},
    {"instruction": "Grüße?", "input": "", "output": "日本語\u2028 and a separator"},
    {"instruction": "Third", "input": "", "output": "3"},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def contents(rows: Rows) -> list[tuple[str, str, str]]:
    return [(e.turns[0].content, e.turns[0].input, e.turns[1].content) for e in rows.examples]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.json", write_json),
        ("lines.json", write_jsonl),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
        ("a.pq", write_parquet),
        ("A.JSONL", write_jsonl),
    ],
)
def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path, name: str, write: Write) -> None:
    path = tmp_path / name
    write(path, ROWS)
    rows = read_rows(path, AUTO)
    assert contents(rows) == [(r["instruction"], r["input"], r["output"]) for r in ROWS]
    assert rows.files == 1
    assert rows.notes == ()


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", write_jsonl), ("a.json", write_json), ("a.csv", write_csv)])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str, write: Write) -> None:
    path = tmp_path / name
    write(path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(contents(read_rows(path, AUTO))) == 3


def test_text_is_one_document_a_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\r\n  two\n \t\n\nthree")
    rows = read_rows(path, AUTO)
    assert [(e.format, e.turns[0].content, e.place.number) for e in rows.examples] == [
        ("text", "one\r\n  two", 3),
        ("text", "three", 7),
    ]


def test_empty_lines_are_passed_over_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a"}\n\n \n{"text": "b"}')
    assert [str(e.place) for e in read_rows(path, AUTO).examples] == [f"{path}, line 2", f"{path}, line 5"]


def test_a_csv_row_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",x\n\ny,z\n')
    assert [e.place.number for e in read_rows(path, AUTO).examples] == [2, 5]


def test_a_csv_field_may_be_longer_than_the_module_allows_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'x' * 200_000}\n")
    assert len(read_rows(path, AUTO).examples[0].turns[0].content) == 200_000


def test_a_folder_is_read_through_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("b/z.jsonl", "c.jsonl", "a.jsonl", ".cache/hidden.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "LICENSE.txt").write_text("All rights.")
    rows = read_rows(tmp_path, AUTO)
    assert [e.turns[0].content for e in rows.examples] == ["a.jsonl", "b/z.jsonl", "c.jsonl"]
    assert rows.files == 3
    assert len(rows.notes) == 1
    assert rows.notes[0].startswith("2 files")


def test_text_beside_structured_files_is_data_when_the_plan_says_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}')
    rows = read_rows(tmp_path, Data(format="text", fields={"text": "text"}))
    assert [e.turns[0].content for e in rows.examples] == ["one", "two"]


def test_files_of_different_formats_may_lie_side_by_side(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completion": "c"}')
    assert {e.format for e in read_rows(tmp_path, AUTO).examples} == {"instruction", "completion"}


GOOD = json.dumps({"prompt": "p", "completion": PRIVATE})


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", f'{GOOD}\n{{"prompt": "{PRIVATE}", \n{GOOD}', "line 2"),
        ("a.jsonl", f'{GOOD}\n\n{{"prompt": "{PRIVATE}"}}', "line 3"),
        ("a.jsonl", f'{GOOD}\n"{PRIVATE}"', "line 2"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": 5, "completion": "{PRIVATE}"}}', "line 2"),
        ("a.jsonl", f'{{"question": "{PRIVATE}"}}', "line 1"),
        ("a.jsonl", f"{GOOD}\n{'[' * 200_000}", "line 2"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": {"9" * 5000}}}', "line 2"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "{PRIVATE}", "completion": "\\ud800"}}', "line 2"),
        ("a.json", f'[\n{GOOD},\n{{"prompt": "{PRIVATE}" 7}}]', "line 3"),
        ("a.json", f'[\n{GOOD},\n\n{{"prompt": "{PRIVATE}"}}]', "row 2"),
        ("a.json", f'[\n{GOOD},\n"{PRIVATE}"]', "row 2"),
        ("a.json", f'{{"data": \n ["{PRIVATE}"]}}', "line 1"),
        ("a.csv", f"prompt,completion\na,b\n{PRIVATE}\n", "line 3"),
        ("a.csv", f"prompt,completion\na,b,{PRIVATE}\n", "line 2"),
        ("a.csv", f'prompt,completion\n"a\nb",c\n"{PRIVATE}"x,d\n', "line 4"),
        ("a.csv", f'prompt,completion\na,b\n"{PRIVATE},c\n', "line 3"),
        ("a.csv", f"prompt,prompt\na,{PRIVATE}\n", "line 1"),
    ],
)
def test_a_broken_row_is_named_and_not_quoted(tmp_path: Path, name: str, content: str, place: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataInvalid) as caught:
        read_rows(tmp_path, AUTO)
    assert f"{path}, {place}:" in str(caught.value)
    assert PRIVATE not in str(caught.value)
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_text_that_is_not_utf8_is_named_by_its_own_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    first = "text\nfine" if name == "a.csv" else '{"text": "fine"}\n'
    path.write_bytes(first.encode() + b"\n" + '{"text": "café"}'.encode("latin-1"))
    with pytest.raises(DataInvalid, match=r"line 3: not UTF-8"):
        read_rows(path, AUTO)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ROWS * 500)
    whole = path.read_bytes()
    cases = {
        "cut": whole[: len(whole) // 2],
        "not parquet": b"hello",
        "empty": b"",
        "page": whole[:10] + bytes(300) + whole[310:],
    }
    for damaged in cases.values():
        path.write_bytes(damaged)
        with pytest.raises(DataInvalid) as caught:
            read_rows(path, AUTO)
        assert str(path) in caught.value.message
        assert "damaged" in caught.value.message


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError) as caught:
        read_rows(path, AUTO)
    assert caught.value.reason == "TRAINER_MISSING"
    assert "pyarrow" in caught.value.message


def test_a_path_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="no such file or folder"):
        read_rows(tmp_path / "absent", AUTO)
    with pytest.raises(DataInvalid, match="no file of a known kind"):
        read_rows(tmp_path, AUTO)
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataInvalid, match="no file of a known kind"):
        read_rows(tmp_path, AUTO)
    with pytest.raises(DataInvalid, match=r"not a kind of file that can be read.*\.jsonl"):
        read_rows(tmp_path / "a.xlsx", AUTO)
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataInvalid, match="holds no rows"):
        read_rows(tmp_path, AUTO)


def test_a_file_that_can_not_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataInvalid, match=r"b\.jsonl: can not be read \(No such file"):
        read_rows(tmp_path, AUTO)


def test_a_text_file_under_another_format_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataInvalid, match=r"plain text, but the plan's data\.format is chat"):
        read_rows(tmp_path, Data(format="chat"))


def test_the_daemon_may_import_what_its_commands_need() -> None:
    code = (
        "import sys; from fsllm_client.data import readers, rows, splits, templates;"
        "sys.exit(','.join({'torch', 'numpy', 'transformers', 'pyarrow'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
