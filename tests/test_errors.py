from __future__ import annotations

import io
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from ldm_vae.data.workers import made_ahead
from ldm_vae.errors import DataError, RunError, one_line_errors
from ldm_vae.files import atomic, staged_directory


def ending(how: str) -> None:
    """Its worker is killed, or finds the data damaged."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise DataError("the index is damaged: build it again")


def said(capsys: pytest.CaptureFixture[str], how: Any) -> str:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        how()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_names_that_are_no_text_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", errors="strict"))
    with one_line_errors():
        print(os.fsdecode(b"left out: \xff.png"), flush=True)
    assert out.getvalue() == b"left out: \\udcff.png\n"


def test_output_that_nobody_reads_any_longer_ends_without_a_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write, "w"))  # noqa: SIM115
    with pytest.raises(SystemExit) as ended, one_line_errors():
        print("a short line, which is written when the command ends")
    assert ended.value.code == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_a_worker_that_the_system_ends_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> None:
        list(made_ahead(ending, ["killed"], num_workers=1))

    def map_in_a_pool() -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            list(pool.map(os.kill, [os.getpid()], [0]))  # it is there
            pool.submit(os._exit, 1).result()

    for how in (load, map_in_a_pool):
        assert "error: the system ended a worker process" in said(capsys, how)


def test_what_a_worker_says_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> None:
        list(made_ahead(ending, ["damaged"], num_workers=1))

    assert said(capsys, load) == "error: the index is damaged: build it again"


@pytest.mark.parametrize("writer", [atomic, staged_directory])
def test_a_link_to_itself_is_refused_as_an_output_and_stays(writer: Any, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RunError, match=r"cannot write .*loop: a symbolic link that leads to itself"):
        writer(tmp_path / "loop").__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["loop"]
    assert (tmp_path / "loop").is_symlink()
