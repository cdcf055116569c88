"""Generate images with a trained pipeline: `ldm-vae generate`, on all processes of a launch.

python pipelines/generate.py --model RUN --output DIR --num-images N

Image i comes from seed S + i alone, whatever the number of processes and the batch size. Each is a PNG that says how it
was made; run again, the command makes those that are missing.
"""

from __future__ import annotations

from ldm_vae.commands.jobs import GenerateConfig
from ldm_vae.commands.seeds import generate_all
from ldm_vae.errors import one_line_errors
from ldm_vae.runs.config import parse_flags


def main(config: GenerateConfig) -> None:
    generate_all(config)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(GenerateConfig, description="Generate images with a trained pipeline."))
