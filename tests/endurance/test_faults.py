"""The test of endurance that breaks the real commands: the whole of it in `make test-all`.

In `make test` each fault has a short test beside the code that meets it: tests/runs, tests/training and others.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_vae.errors import ConfigError, RunError
from tests.endurance.faults.__main__ import FAULTS, Config, main, table
from tests.endurance.faults.jobs import Job, Workshop, unclean_error


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(fault: str, tmp_path: Path) -> None:
    main(Config(output=tmp_path, only=(fault,)))
    if "not tried" in (tmp_path / "table.md").read_text():
        pytest.skip("no right to mount a disk")


def test_a_result_that_differs_is_seen(tmp_path: Path) -> None:
    """Commands that count their starts: disturbed ones never give the same result."""
    counting = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(exist_ok=True); f = p / 'starts'; "
    counting += "f.write_text(f.read_text() + 'x' if f.exists() else 'x')"
    job = Job(name="counting", words=("-c", counting, "{output}"), results=("starts",))
    shop = Workshop(tmp_path / "work")
    shop.jobs = {"counting": job}
    assert shop.undisturbed(job).digests.keys() == {"starts"}
    assert shop.difference(job, tmp_path / "out") == ""
    assert shop.difference(job, tmp_path / "out") == "differing: starts"
    failing = Job(name="counting", words=("-c", "raise SystemExit('error: no')"), results=())
    assert shop.difference(failing, tmp_path / "out") == "cannot be resumed: error: no"
    assert unclean_error(2, "error: No space left", "No space") == ""
    assert (
        unclean_error(1, "Traceback ...\nOSError: No space left", "No space")
        == "exit code 1, said OSError: No space left"
    )


def test_an_unknown_fault_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--only fire is not known: try kill, term"):
        main(Config(output=tmp_path, only=("fire",)))
    (tmp_path / "work").mkdir()
    with pytest.raises(RunError, match="work is not from this test"):
        main(Config(output=tmp_path))
    for text in ("{}", "[]", '{"counts"'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(RunError, match=r"results.json is no record of this test"):
            main(Config(output=tmp_path))
    assert list((tmp_path / "work").iterdir()) == []
    assert "| nothing |" in table([{"fault": "a", "command": "b", "tried": 1, "happened": "c", "lost": []}])
