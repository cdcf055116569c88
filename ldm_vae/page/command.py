"""`ldm-vae page`: the models in a browser. Nothing slow is imported before the page starts."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ldm_vae.errors import ConfigError
from ldm_vae.page.flags import Page
from ldm_vae.runs.config import check_ranges

MAX_UPLOAD = "64mb"
MAX_WAITING = 32
"""Requests in the queue."""


def check(command: Page) -> None:
    """Raises ConfigError."""
    check_ranges(command)
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio, which is not installed: pip install 'ldm-vae[page]'")
    with socket.socket(socket.AF_INET6 if ":" in command.host else socket.AF_INET) as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((command.host, command.port))
        except OSError as error:
            why = f"cannot listen at {command.host}, port {command.port}: {error.strerror}"
            raise ConfigError(f"{why}; choose another --port, or --host") from None


@contextmanager
def serving(command: Page) -> Iterator[str]:
    """The page's address, as long as it is served; all that is written meanwhile goes into a folder that then goes.

    Raises:
        ConfigError, ModelError: flags or models that cannot work.
    """
    check(command)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    usual = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="ldm-vae-page-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "shown")  # copies of what an event's own folder had
        try:
            from ldm_vae.page.layout import LAUNCH, blocks_of

            blocks = blocks_of(command)
            blocks.queue(max_size=MAX_WAITING)
            blocks.launch(server_name=command.host, server_port=command.port, max_file_size=MAX_UPLOAD, **LAUNCH)
            try:
                yield f"http://{command.host}:{command.port}"
            finally:
                blocks.close(verbose=False)
        finally:
            tempfile.tempdir = usual
            del os.environ["GRADIO_TEMP_DIR"]


def open_page(command: Page) -> None:
    """Serves the page until it is interrupted or told to end."""
    with serving(command) as address:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
