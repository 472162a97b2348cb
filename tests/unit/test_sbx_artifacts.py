"""Outputs are untrusted: only plain files that were asked for, within caps, under printable names."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from controller.sbx.artifacts import Caps, artifact, choose, unpack

CAPS = Caps(files=3, file_bytes=100, total_bytes=150)


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for info, content in members:
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_names_decide_the_kind() -> None:
    assert [artifact(name, b"").kind for name in ("junit.xml", "a/junit.xml", "my-junit.xml", "junit.xml.txt")] == [
        *("junit", "junit", "file", "file")
    ]


def test_files_are_chosen_within_caps(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, size in {"a": 100, "big": 101, "sub/b": 50, "z": 1}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "loop").symlink_to(".")
    found = choose(tmp_path, caps=CAPS)
    assert found.paths == ("a", "z")
    assert len(found.remarks) == 4  # big, link, loop, and sub/b by the total


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\u202etxt", os.fsdecode(b"\xff")])
def test_names_that_people_cannot_read_are_left_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    found = choose(tmp_path, caps=CAPS)
    assert found.paths == ()
    assert found.remarks[0].isprintable() and found.remarks[0].isascii()


def test_the_names_of_what_the_command_prints_are_not_a_tasks_to_take(tmp_path: Path) -> None:
    for name in ("stdout.txt", "stderr.txt", "a/stdout.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = choose(tmp_path, caps=CAPS)
    assert found.paths == ("a/stdout.txt",) and len(found.remarks) == 2
    assert "left out: its name is that of what the command printed" in found.remarks[0]


def test_only_regular_files_that_were_asked_for_are_taken() -> None:
    link = tarfile.TarInfo("wanted")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/shadow"
    content = tar(
        (link, b""),
        (tarfile.TarInfo("other"), b"no"),
        (tarfile.TarInfo("good"), b"yes"),
        (tarfile.TarInfo("large"), b"x" * 101),
    )
    assert [(a.name, a.content) for a in unpack(content, ["wanted", "good", "large"], caps=CAPS)] == [("good", b"yes")]


def test_what_is_no_archive_is_an_error() -> None:
    with pytest.raises(tarfile.TarError):
        unpack(b"x" * 1024, ["a"], caps=CAPS)
