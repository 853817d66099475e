"""What the self-contained pages share: a template filled with one JSON block, pictures as small data URLs."""

import base64
import io
import json
import re
from pathlib import Path

from common import InputError
from lib import data

STYLED = "report.html"  # the template whose style the others take over


def fill(template, block):
    """A template of lib/ with `block` as its data → the page. Whatever stands in the data stays text."""
    folder = Path(__file__).parent
    page = (folder / template).read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", (folder / STYLED).read_text(encoding="utf-8"), re.S)
    page = page.replace("{{STYLE}}", style[1], 1)
    return page.replace("{{DATA}}", json.dumps(block).replace("<", "\\u003c"), 1)


def thumbnail(path, side=480):
    """The image as a small data URL, or None where it cannot be read."""
    try:
        image = data.load_image(path)
    except InputError:
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
