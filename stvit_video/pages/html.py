"""Self-contained HTML pages: pictures and data are part of the file, so it works from a disk without a network."""

import base64
import secrets
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from stvit_video import __version__

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> str:
    """Return a page from ``templates/``; text in ``values`` is escaped, so a name cannot become a tag.

    Were it to, the browser runs no script but the page's own, which has the ``nonce``, and loads nothing from
    elsewhere.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return printable(
        environment.get_template(template).render(version=__version__, nonce=secrets.token_hex(16), **values)
    )


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes as a data address; ``kind`` is a MIME type such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_uri(picture: NDArray[np.uint8], sharp: bool = False) -> str:
    """Return a picture (H, W, 3) as the data address of a WebP; ``sharp`` ones are larger JPEGs.

    WebP halves the resolution of colours, which then run over the edges of painted squares.
    """
    file = BytesIO()
    form, options = ("jpeg", {"quality": 88, "subsampling": 0}) if sharp else ("webp", {"quality": 86, "method": 4})
    Image.fromarray(picture).save(file, format=form, **options)
    return data_uri(file.getvalue(), f"image/{form}")


def printable(text: str) -> str:
    """Return text that can be encoded, also from file names that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
