"""Who a browser is: a secret that it keeps, so that a page opened again finds its own runs, and nobody else does."""

from __future__ import annotations

import gradio as gr

from .runs import is_person, new_person

KEY = "diffusionfm-studio"


def person(studio: gr.Blocks) -> gr.BrowserState:
    """The state that holds it, made out by the first page that a browser opens."""
    state = gr.BrowserState("", storage_key=KEY, secret=KEY)  # what it holds is the secret
    studio.load(
        lambda known: known if is_person(known) else new_person(),
        state,
        state,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return state
