"""The page as a whole: its tabs, and how Gradio serves it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ldm_vae.page.autoencode import autoencode_tab, denoise_tab
from ldm_vae.page.compress import compress_tab
from ldm_vae.page.flags import Page

HOUR = 3600
CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
.quiet p {color: var(--neutral-500)}
"""
INTRODUCTION = """# ldm-vae
Small models for images. They run on the machine that serves this page, and send nothing elsewhere.
"""
LAUNCH: dict[str, Any] = {
    **{"prevent_thread_lock": True, "quiet": True, "inbrowser": False, "css": CSS},
    "theme": gr.themes.Default().set(block_info_text_color="*neutral_500"),
    **{"share": False, "ssr_mode": False, "pwa": False, "mcp_server": False, "enable_monitoring": False},
    **{"run_history": False, "footer_links": [], "allowed_paths": [], "auth": None},
}
"""Nothing but the page, and nothing from elsewhere."""


def blocks_of(command: Page) -> gr.Blocks:
    """The page, its models loaded. Raises ModelError, ConfigError."""
    with gr.Blocks(title="ldm-vae", analytics_enabled=False, delete_cache=(HOUR // 6, HOUR)) as blocks:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Compress"):
            compress_tab(command)
        if command.generate:
            from ldm_vae.page.generate import generate_tab  # its imports take seconds

            with gr.Tab("Generate"):
                generate_tab(command.generate, command.max_pixels)
        with gr.Tab("Autoencode"):
            autoencode_tab(command)
        if command.denoise:
            with gr.Tab("Denoise"):
                denoise_tab(command.denoise, command.max_pixels)
    return blocks
