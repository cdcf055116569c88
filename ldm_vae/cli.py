"""`ldm-vae COMMAND`: the table of commands, and `main`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from ldm_vae.commands.anomaly import Anomaly, find_anomalies
from ldm_vae.commands.codec import Compress, Decompress, compress, decompress
from ldm_vae.commands.denoise import Denoise, denoise_files
from ldm_vae.commands.embed import Embed, embed_images
from ldm_vae.commands.export import Export, export
from ldm_vae.commands.fit_codec import FitCodec, fit_codec
from ldm_vae.commands.generate import Generate, generate_images
from ldm_vae.commands.info import Info, info
from ldm_vae.commands.models import Models, models
from ldm_vae.commands.publish import Publish, publish
from ldm_vae.commands.reconstruct import Reconstruct, reconstruct_files
from ldm_vae.commands.shards import Shards, work_on_shards
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.page.command import open_page
from ldm_vae.page.flags import Page
from ldm_vae.runs.config import tyro_errors

COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "compress": (Compress, compress),
    "decompress": (Decompress, decompress),
    "denoise": (Denoise, denoise_files),
    "generate": (Generate, generate_images),
    "reconstruct": (Reconstruct, reconstruct_files),
    "page": (Page, open_page),
    "info": (Info, info),
    "models": (Models, models),
    "fit-codec": (FitCodec, fit_codec),
    "export": (Export, export),
    "publish": (Publish, publish),
    "embed": (Embed, embed_images),
    "anomaly": (Anomaly, find_anomalies),
    "shards": (Shards, work_on_shards),
}


def main(args: Sequence[str] | None = None) -> None:
    """The command line; ends with one line on standard error and exit code 2 for what the user can put right."""
    args = sys.argv[1:] if args is None else args
    with one_line_errors():
        try:
            with tyro_errors():
                classes: dict[str, Any] = {name: command for name, (command, _) in COMMANDS.items()}
                command = tyro.extras.subcommand_cli_from_dict(classes, args=args, prog="ldm-vae")
        except ConfigError as error:
            raise ConfigError(f"{hint_on_dashes(args)}{error}") from None
        dict(COMMANDS.values())[type(command)](command)  # type: ignore[index]


def hint_on_dashes(args: Sequence[str]) -> str:
    """What to write for a file whose name begins with a dash, where one of the words may be one."""
    dashed = next((word for word in args if re.match(r"-(?!o$)[^-]", word)), None)
    return f"{dashed} was read as a flag: if it is a file, write ./{dashed}, or -- before it; " if dashed else ""


if __name__ == "__main__":
    main()
