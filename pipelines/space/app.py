"""The page as a Hugging Face Space (SDK: gradio): upload this file and requirements.txt."""

from __future__ import annotations

from ldm_vae.cli import main

if __name__ == "__main__":
    main(["page", "--host", "0.0.0.0"])
