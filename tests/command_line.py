"""Commands as a user types them."""

from __future__ import annotations

import pytest

from ldm_vae import cli


def run(*words: object) -> None:
    cli.main([str(w) for w in words])


def fails(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one line that a command which cannot work prints, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*words)
    assert exit_.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    return said[0]
