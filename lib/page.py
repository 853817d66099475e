"""What the self-contained pages share: a template filled with one JSON block, pictures as small data URLs."""

import base64
import html
import io
import json
import re
from pathlib import Path

from common import InputError
from lib import data

STYLED = "report.html"  # the template whose style the others take over


def fill(template, block, title="", figures=""):
    """The page of lib/`template`: {{DATA}} is `block`, its one JSON block, which no text in it can leave;
    {{TITLE}} is text, {{FIGURES}} is HTML, {{STYLE}} is the style of STYLED."""
    folder = Path(__file__).parent
    style = re.search(r"<style>(.*?)</style>", (folder / STYLED).read_text(encoding="utf-8"), re.S)
    parts = {
        "STYLE": style[1],
        "TITLE": html.escape(title),
        "FIGURES": figures,
        "DATA": json.dumps(block).replace("<", "\\u003c"),
    }
    page = (folder / template).read_text(encoding="utf-8")
    # in one pass: what is filled in holds no place to fill
    return re.sub(r"\{\{(STYLE|TITLE|FIGURES|DATA)\}\}", lambda match: parts[match[1]], page)


def thumbnail(path, side=480):
    """The image as a small data URL, or None where it cannot be read: another system's file may come without
    images."""
    try:
        image = data.load_image(path)
    except InputError:
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
