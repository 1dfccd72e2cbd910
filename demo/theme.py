"""How the studio looks: warm paper by day, warm ink by night, one vermilion accent, the system's fonts."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import gradio as gr
from gradio.themes.utils import colors, sizes

from diffusionfm.colors import COLORS

STYLE = Path(__file__).with_name("style.css")

VERMILION = colors.Color(
    name="vermilion",
    c50="#fff3ee",
    c100="#ffe4d9",
    c200="#ffc7b3",
    c300="#ffa385",
    c400="#ff855e",
    c500="#ee5f33",
    c600="#c9421a",
    c700="#a63312",
    c800="#862b12",
    c900="#6d2713",
    c950="#3b1007",
)

MARK = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" aria-hidden="true">'
    '<rect width="32" height="32" rx="9" fill="#c9421a"/>'
    '<path d="M6 6h10v10H6zM16 16h10v10H16z" fill="#fff" opacity=".26"/>'
    '<path d="M16 6.5 18.6 13.4 25.5 16 18.6 18.6 16 25.5 13.4 18.6 6.5 16 13.4 13.4z" fill="#fff"/></svg>'
)
"""The mark: a spark over a checkerboard, that is, a picture on nothing."""

HEAD = (
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<link rel="icon" type="image/svg+xml" href="data:image/svg+xml,{quote(MARK)}">'
)


def css() -> str:
    """style.css, and a swatch for every colour word of the library's table."""
    dots = "".join(
        f'.swatches label:has([value="{word}"]) {{ background: {value} !important; }}\n'
        for word, value in COLORS.items()
    )
    return STYLE.read_text(encoding="utf-8") + dots


def theme() -> gr.themes.Base:
    """The studio's theme, light and dark."""
    return gr.themes.Base(
        primary_hue=VERMILION,
        secondary_hue=VERMILION,
        neutral_hue=colors.stone,
        radius_size=sizes.radius_lg,
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"),
    ).set(
        body_background_fill="#faf7f2",
        body_background_fill_dark="#161311",
        body_text_color="#241f1b",
        body_text_color_dark="#f1ebe4",
        body_text_color_subdued="#6b6259",
        body_text_color_subdued_dark="#ada398",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1f1b18",
        background_fill_secondary="#f4efe8",
        background_fill_secondary_dark="#1a1613",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1f1b18",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="#4f473f",
        block_label_text_color_dark="#cfc6bb",
        block_title_text_color="#4f473f",
        block_title_text_color_dark="#cfc6bb",
        block_title_text_weight="600",
        block_info_text_color="#6b6259",
        block_info_text_color_dark="#ada398",
        block_shadow="none",
        block_shadow_dark="none",
        border_color_primary="#e6ded3",
        border_color_primary_dark="#372f29",
        input_background_fill="#fdfbf8",
        input_background_fill_dark="#171411",
        input_border_width="1px",
        input_border_color="#d9cfc2",
        input_border_color_dark="#453b33",
        input_border_color_focus="#c9421a",
        input_border_color_focus_dark="#ff855e",
        input_shadow_focus="0 0 0 3px rgb(201 66 26 / .18)",
        input_shadow_focus_dark="0 0 0 3px rgb(255 133 94 / .22)",
        input_placeholder_color="#857a6f",
        input_placeholder_color_dark="#8f857a",
        button_primary_background_fill="#c9421a",
        button_primary_background_fill_dark="#ff855e",
        button_primary_background_fill_hover="#a63312",
        button_primary_background_fill_hover_dark="#ffa385",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#2a0d03",
        button_primary_border_color="transparent",
        button_primary_border_color_dark="transparent",
        button_secondary_background_fill="#f1eae1",
        button_secondary_background_fill_dark="#2c2621",
        button_secondary_background_fill_hover="#e8dfd3",
        button_secondary_background_fill_hover_dark="#3a322b",
        button_secondary_text_color="#3a332d",
        button_secondary_text_color_dark="#f1ebe4",
        button_large_radius="12px",
        button_medium_radius="10px",
        button_small_radius="8px",
        slider_color="#c9421a",
        slider_color_dark="#ff855e",
        checkbox_background_color_selected="#c9421a",
        checkbox_background_color_selected_dark="#c9421a",
        checkbox_border_color_selected="#c9421a",
        checkbox_border_color_selected_dark="#ff855e",
    )
