"""`ldm-vae COMMAND`: the table of commands, and `main`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tyro

from ldm_vae.commands.anomaly import Anomaly, find_anomalies
from ldm_vae.commands.codec import Compress, Decompress, Info, compress, decompress, info
from ldm_vae.commands.embed import Embed, embed_images
from ldm_vae.commands.fit_codec import FitCodec, fit_codec
from ldm_vae.commands.shards import Shards, work_on_shards
from ldm_vae.errors import one_line_errors
from ldm_vae.runs.config import tyro_errors

COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "compress": (Compress, compress),
    "decompress": (Decompress, decompress),
    "info": (Info, info),
    "fit-codec": (FitCodec, fit_codec),
    "embed": (Embed, embed_images),
    "anomaly": (Anomaly, find_anomalies),
    "shards": (Shards, work_on_shards),
}


def main(args: Sequence[str] | None = None) -> None:
    """The command line; ends with one line on standard error and exit code 2 for what the user can put right."""
    with one_line_errors():
        with tyro_errors():
            classes: dict[str, Any] = {name: command for name, (command, _) in COMMANDS.items()}
            command = tyro.extras.subcommand_cli_from_dict(classes, args=args, prog="ldm-vae")
        dict(COMMANDS.values())[type(command)](command)  # type: ignore[index]


if __name__ == "__main__":
    main()
