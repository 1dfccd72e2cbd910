"""The Gradio studio, a prompt and its pictures in a browser: `python -m demo.app`, or `diffusionfm demo`."""
