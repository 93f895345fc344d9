"""Self-contained HTML pages: pictures and data are part of the file, so it works from a disk without a network."""

import base64
import json
from io import BytesIO
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from stvit_video import __version__

TYPES = {"png": "image/png", "webp": "image/webp", "svg": "image/svg+xml", "mp4": "video/mp4"}


def render(template: str, **values: Any) -> str:
    """Return a page from ``templates/``; text in ``values`` is escaped, so a name cannot become a tag."""
    environment = Environment(
        loader=PackageLoader("stvit_video.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = script_json
    return environment.get_template(template).render(version=__version__, **values)


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes as a data address; ``kind`` is png, webp, svg or mp4."""
    return f"data:{TYPES[kind]};base64,{base64.b64encode(content).decode()}"


def picture_uri(picture: NDArray[np.uint8], quality: int = 86) -> str:
    """Return a picture (H, W, 3) as the data address of a WebP."""
    file = BytesIO()
    Image.fromarray(picture).save(file, format="WEBP", quality=quality, method=4)
    return data_uri(file.getvalue(), "webp")


def packed(values: NDArray[np.uint8]) -> str:
    """Return bytes as base64, which ``unpack`` in the page's script reads."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def script_json(value: Any) -> Markup:
    """Return JSON for a script element; nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def printable(text: str) -> str:
    """Return text that can be encoded, also from file names that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
