from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ldm_vae.data.loader import Batch
from ldm_vae.errors import ConfigError, RunError
from ldm_vae.files import atomic, beside_of, staged_directory, write_csv
from ldm_vae.progress import progress
from ldm_vae.runs import loop
from ldm_vae.runs import run as run_module
from ldm_vae.runs.config import RunConfig, parse_flags
from ldm_vae.runs.loop import Loop
from ldm_vae.runs.run import Checkpoint, Run, git_revision


@dataclass(frozen=True, kw_only=True)
class Config:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    paths: tuple[str, ...] = ("a",)
    workers: int = 0


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, tensors={"a": torch.full((3, 4), float(step))}, facts={"seconds": 1.5 * step})


def test_a_checkpoint_comes_back_as_it_was_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", Config())
    assert run.load_newest() is None
    (tmp_path / "run" / "checkpoints" / ".step-3.ldm-vae.new").mkdir()  # of a save that was killed
    (tmp_path / "run" / "checkpoints" / "step-1-keep").mkdir()  # somebody's copy
    for step in (2, 4, 10):
        run.save(checkpoint(step))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-1-keep", "step-10", "step-4"]
    newest = Run(tmp_path / "run", Config()).load_newest()
    assert newest is not None
    assert (newest.step, newest.facts) == (10, {"seconds": 15.0})
    assert torch.equal(newest.tensors["a"], torch.full((3, 4), 10.0))


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_whatever_is_damaged_in_the_newest_checkpoint_the_one_before_is_used(
    file: str, damage: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, Config())
    run.save(checkpoint(1))
    run.save(checkpoint(2))
    path = tmp_path / "checkpoints" / "step-2" / file
    data = path.read_bytes()
    at = data.index(b'"sha256": "') + 15 if file == "state.json" else len(data) - 3
    changed = {
        "truncated": data[: len(data) // 2],
        "flipped": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        "empty": b"",
    }
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    with pytest.warns(UserWarning, match="step-2 is damaged"):
        loaded = run.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    (tmp_path / "checkpoints" / "step-1" / "state.json").unlink()
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(RunError, match="none of the checkpoints"):
        run.load_newest()


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staged_directory(target) as staging:
        (staging / "weights").write_text("old")

    def fail() -> None:
        with staged_directory(target) as staging:
            (staging / "weights").write_text("new")
            raise OSError("disk full")

    with pytest.raises(RunError, match=r"cannot write .*/model: disk full"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "weights").read_text() == "old"
    with staged_directory(target) as staging:
        (staging / "weights").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "weights").read_text() == "new"


def test_resuming_with_other_settings_lists_what_differs(tmp_path: Path) -> None:
    Run(tmp_path, Config(), free=("workers",))
    Run(tmp_path, Config(workers=5), free=("workers",))
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["config"]["sizes"]  # a version before had no such field
    saved["config"]["paths"] = "a"  # and took one path
    (tmp_path / "config.json").write_text(json.dumps(saved))
    Run(tmp_path, Config(), free=("workers",))
    with pytest.raises(RunError, match=r"\(rate: 0.1 -> 0.2; sizes: \[1, 2\] -> \[1\]\)"):
        Run(tmp_path, Config(rate=0.2, sizes=(1,), workers=5), free=("workers",))
    (tmp_path / "config.json").write_text("something else")
    with pytest.raises(RunError, match="not a run's configuration"):
        Run(tmp_path, Config())


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path, Config())
    for step in range(1, 6):
        run.log(step, {"loss": step / 2})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # cut short by a crash
    run.forget_after(3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": s, "loss": s / 2} for s in (1, 2, 3)]


def test_a_bad_image_is_named_once(tmp_path: Path) -> None:
    for _ in range(2):
        run = Run(tmp_path, Config())
        run.add_bad_images({'b, "x".png': "cut\nshort", "a\udcff.png": "empty file"})
    text = (tmp_path / "bad_images.csv").read_bytes().decode("utf-8", "surrogateescape")
    assert text.count("empty file") == 1
    assert run.read_bad_images() == {'b, "x".png': "cut\nshort", "a\udcff.png": "empty file"}


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    run = Run(tmp_path, Config(), main=False)
    run.log(1, {"a": 1.0})
    run.save(checkpoint(1))
    run.add_bad_images({"a": "b"})
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def in_another_process(directory: Path) -> str:
    """What is said to another process that opens the run."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            Run(directory, Config())
            os.write(writer, b"let in")
        except RunError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as said:
        return said.read()


def test_a_second_process_is_kept_out_until_the_first_is_done_or_dead(tmp_path: Path) -> None:
    run = Run(tmp_path, Config())
    before = sorted(p.name for p in tmp_path.iterdir())
    assert "another process is at work" in in_another_process(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    Run(tmp_path / "other", Config())
    run.release()
    assert in_another_process(tmp_path) == "let in"
    assert in_another_process(tmp_path) == "let in"  # the one before ended without a word


# A disk that is full or read-only ------------------------------------------------------------------------------------


def test_a_full_disk_costs_only_what_did_not_fit(small_disk: Path) -> None:
    run = Run(small_disk / "run", Config())
    run.save(checkpoint(1))
    large = Checkpoint(step=2, tensors={"a": torch.zeros(1 << 20)}, facts={})
    with pytest.raises(RunError, match=r"cannot write .*step-2.*No space left on device"):
        run.save(large)
    checkpoint_left = run.load_newest()
    assert checkpoint_left is not None
    assert checkpoint_left.step == 1
    assert [p.name for p in (small_disk / "run" / "checkpoints").iterdir()] == ["step-1"]
    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: No space left on device"):
        run.log(2, {"x" * (1 << 21): 1.0})
    run.release()


def test_a_read_only_directory_is_said_in_one_line(small_disk: Path) -> None:
    Run(small_disk / "run", Config()).release()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for name in ("run", "new"):
        with pytest.raises(RunError, match=r"cannot write to .*: Read-only file system"):
            Run(small_disk / name, Config())


@pytest.mark.parametrize("positions", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_one_bit_anywhere_in_a_checkpoint_is_noticed(positions: int, tmp_path: Path) -> None:
    run = Run(tmp_path, Config())
    for step in (1, 2):
        run.save(checkpoint(step))
    rng = random.Random(0)
    outcomes = set()
    for number in range(positions):
        file = tmp_path / "checkpoints" / "step-2" / ("state.json" if number % 2 else "state.safetensors")
        data = file.read_bytes()
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run.load_newest()
        assert found is not None
        expected = checkpoint(found.step)
        assert found.facts == expected.facts
        assert torch.equal(found.tensors["a"], expected.tensors["a"])
        outcomes.add(found.step)
        file.write_bytes(data)
    assert 1 in outcomes


def test_a_folder_is_back_after_a_kill_between_its_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "codec"
    with staged_directory(target) as staging:
        (staging / "tables").write_text("old")
    os.rename(target, beside_of(target, "old"))
    beside_of(target, "new").mkdir()

    def fail() -> None:
        with staged_directory(target):
            raise OSError("disk full")

    with pytest.raises(RunError, match="disk full"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["codec"]
    assert (target / "tables").read_text() == "old"


def test_files_of_others_beside_a_target_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / ".model.backup"
    mine.mkdir()
    with staged_directory(tmp_path / "model") as staging:
        (staging / "weights").write_text("new")
    assert {p.name for p in tmp_path.iterdir()} == {".model.backup", "model"}


def test_a_file_has_the_rights_and_may_have_the_name_that_the_system_allows(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        for name in ("a" * 255, "é" * 127, "a.png"):
            with atomic(tmp_path / name) as out:
                out.write(b"x")
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        with staged_directory(tmp_path / "model") as staging:
            (staging / "weights").write_text("new")
        assert (tmp_path / "model").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"old")
    (tmp_path / "real" / "a.png").chmod(0o640)
    (tmp_path / "a.png").symlink_to("real/a.png")
    (tmp_path / "model").symlink_to("real")
    with atomic(tmp_path / "a.png") as out:
        out.write(b"new")
    assert (tmp_path / "a.png").is_symlink()
    assert (tmp_path / "real" / "a.png").read_bytes() == b"new"
    assert (tmp_path / "real" / "a.png").stat().st_mode & 0o777 == 0o640
    with staged_directory(tmp_path / "model") as staging:
        (staging / "weights").write_text("new")
    assert (tmp_path / "model").is_symlink()
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["weights"]


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic(tmp_path / "pipe") as out:
        out.write(b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with atomic(Path(os.devnull)) as out:
        out.write(b"gone")
    assert Path(os.devnull).is_char_device()


def test_a_table_takes_every_name_and_stays_when_the_next_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "bad_images.csv"
    rows = [{"name": os.fsdecode(b"\xff.png"), "reason": 'says "no",\nand é'}, {"name": "b.png", "reason": ""}]
    write_csv(file, rows)
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as written:
        assert list(csv.DictReader(written)) == rows
    with pytest.raises(UnicodeEncodeError):
        write_csv(file, [*rows, {"name": "\ud800", "reason": "no name that a system gives"}])
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as written:
        assert list(csv.DictReader(written)) == rows
    assert list(tmp_path.iterdir()) == [file]
    write_csv(file, [])
    assert file.read_bytes() == b"name,reason\r\n"


def test_processes_that_see_other_checkpoints_do_not_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would go on from its own, and average its gradients with the others'."""
    config = RunConfig(output=tmp_path / "run", steps=10, tracker="none")
    run = Run(config.output, config)
    monkeypatch.setattr(loop, "gather_object", lambda found: [*found, (5, "another")])
    with pytest.raises(RunError, match="do not find the same checkpoint"):
        Loop(run, {}, config, Accelerator(cpu=True))


def no_images(rows: list[int]) -> Batch[np.ndarray]:
    return Batch(images=np.zeros((len(rows), 0), np.float32), positions=rows, bad_images={})


def lines_of_a_loop(output: Path, *, stop_in: int | None = None, unhealthy: tuple[int, ...] = ()) -> list[tuple]:
    """(step, what) of each line that twelve steps log, of which these are not healthy when they are first taken."""
    config = RunConfig(
        output=output, steps=12, batch_size=1, num_workers=0, log_every=4, checkpoint_every=4, sample_every=4
    )
    run, seen = Run(output, config), []
    with Loop(run, {"a": torch.zeros(1)}, replace(config, tracker="none"), Accelerator(cpu=True)) as steps:
        for step, _ in steps.steps(defaultdict(int), no_images):
            seen.append(step)
            time.sleep(0.01)
            if step == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
            steps.finish(healthy=step not in unhealthy or seen.count(step) > 1, waited=0.01, bad_images={})
            if steps.logging:
                steps.log_step({"loss": 1.0})
            if steps.drawing:
                steps.log({"grid": 1.0})
            if steps.saving:
                run.save(Checkpoint(step=steps.step, tensors={"a/value": torch.zeros(1)}, facts=steps.facts))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line.get("waiting_for_data", 0) <= 1.01 for line in lines)
    return [(line["step"], "grid" if "grid" in line else "log") for line in lines]


def test_a_stop_in_a_step_with_a_grid_costs_none_of_it(tmp_path: Path) -> None:
    undisturbed = lines_of_a_loop(tmp_path / "undisturbed")
    assert [step for step, what in undisturbed if what == "grid"] == [4, 8, 10, 12]
    for last in (7, 11):
        lines_of_a_loop(tmp_path / f"{last}", stop_in=last)
        assert lines_of_a_loop(tmp_path / f"{last}") == undisturbed


def test_after_going_back_the_time_spent_waiting_is_that_of_the_steps_counted(tmp_path: Path) -> None:
    assert (12, "log") in lines_of_a_loop(tmp_path / "run", unhealthy=(8, 9, 10))


def test_a_log_file_gets_a_line_at_each_logging_step_and_no_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines_of_a_loop(tmp_path / "run")
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 4/12", "step 8/12", "step 12/12"]
    assert all(re.fullmatch(r"step \d+/12, [\d.]+ images/s, 00:00 left: loss 1", line) for line in lines)


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(progress(range(3), unit="image")) == [0, 1, 2]
    assert "3/3" in terminal.getvalue()
    list(progress(range(3), unit="image", show=False))
    assert terminal.getvalue().count("3/3") == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--steps", "a"], "Error parsing --steps: invalid literal"),
        (["--mixed-precision", "fp16"], "invalid choice 'fp16' for argument '--mixed-precision'"),
        (["--stepz", "3"], "Unrecognized options: --stepz"),
    ],
)
def test_a_wrong_flag_is_said_once(flag: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_flags(RunConfig, description="A run.", args=["--output", "run", *flag])
    text = str(error.value)
    assert text.lower().count(message.lower()) == 1
    assert "\n" not in text
    assert not re.search(r"(\w+ \w+):? \1", text, re.IGNORECASE), "the title again"


def test_the_commit_is_that_of_the_code_and_not_of_another_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a wheel is installed into an environment inside somebody's checkout."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    installed = tmp_path / "site" / "run.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(run_module, "__file__", str(installed))
    assert git_revision() is None
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    assert git_revision() is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "ours"], check=True)
    revision = git_revision()
    assert revision is not None
    assert len(revision) == 40
    installed.write_text("changed")
    assert git_revision() == f"{revision}-dirty"
