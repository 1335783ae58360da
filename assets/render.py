"""Draws the pictures of the pack's page in ComfyUI's registry from their vectors: `python assets/render.py`."""

from pathlib import Path

import resvg_py

for vector in Path(__file__).parent.glob("*.svg"):
    picture = resvg_py.svg_to_bytes(svg_path=str(vector), skip_system_fonts=True)
    vector.with_suffix(".png").write_bytes(bytes(picture))
