"""`ldm-vae page` before anything is served; needs no Gradio."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from ldm_vae.page.flags import Page, in_box
from tests.command_line import fails


def test_without_gradio_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fails(capsys, "page") == (
        "error: the page needs Gradio, which is not installed: pip install 'ldm-vae[page]'"
    )


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = fails(capsys, "page", "--port", port)
    assert said.startswith(f"error: cannot listen at 127.0.0.1, port {port}: ")
    assert "choose another --port" in said


def test_models_that_the_box_does_not_have_have_no_tab() -> None:
    assert in_box("box:codec") == "box:codec"
    assert in_box("box:nothing-of-this-name") is None


def test_the_page_is_for_this_machine_unless_told_otherwise() -> None:
    assert Page().is_local
    assert not Page(host="0.0.0.0").is_local
