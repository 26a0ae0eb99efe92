"""Writes grids of images as one PNG, side by side with captions, for `demo` and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import write_whole

_MARGIN = 8
_BACKGROUND, _INK = (255, 255, 255), (32, 32, 32)


def grid(
    images: Any,
    path: str | Path,
    columns: int = 10,
    scale: int = 2,
    titles: Sequence[str] | None = None,
) -> Path:
    """Writes a PNG of one grid of images, or of several of equal shape side by side, and returns its path.

    The file appears whole or not at all.

    Args:
        images: [N, channels, height, width] in [-1, 1], or a sequence of such arrays, the float model's first. One
            channel is gray; of three or more the first three are red, green and blue.
        path: the file to write.
        columns: images in a row of each grid.
        scale: pixels of the PNG along a side of an image's pixel; images are enlarged without smoothing.
        titles: a caption for every grid.

    Raises:
        UserError: images of different shapes, an argument out of range, or a file that cannot be written.
    """
    panels = [np.asarray(images)] if not isinstance(images, list | tuple) else [np.asarray(i) for i in images]
    if not panels or any(p.ndim != 4 or not p.size or p.shape != panels[0].shape for p in panels):
        shapes = ", ".join(str(list(panel.shape)) for panel in panels) or "none"
        raise UserError(f"a picture needs grids of one shape [N, channels, height, width], not {shapes}")
    if columns < 1 or scale < 1 or (titles is not None and len(titles) != len(panels)):
        raise UserError("a picture needs 1 column or more, a scale of 1 or more, and a title for every grid")
    pixels = [_panel(panel, columns, scale) for panel in panels]
    height, width = pixels[0].shape[:2]
    font = ImageFont.load_default(size=14)
    caption = 24 if titles else 0
    canvas = Image.new(
        "RGB",
        (len(pixels) * width + (len(pixels) + 1) * _MARGIN, height + caption + 2 * _MARGIN),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    for i, panel in enumerate(pixels):
        left = _MARGIN + i * (width + _MARGIN)
        canvas.paste(Image.fromarray(panel), (left, _MARGIN + caption))
        if titles:
            draw.text((left, _MARGIN), _fitted(titles[i], width, font), fill=_INK, font=font)
    return _save(canvas, Path(path))


def levels(images: np.ndarray) -> np.ndarray:
    """Converts values in [-1, 1] to uint8 [N, channels, height, width]; values beyond are clipped, NaN is gray."""
    return np.clip(np.rint((np.nan_to_num(images.astype(np.float64)) + 1) * 127.5), 0, 255).astype(np.uint8)


def _panel(images: np.ndarray, columns: int, scale: int) -> np.ndarray:
    """One grid as uint8 [rows * height * scale, columns * width * scale, 3]; cells without an image are background."""
    count, channels, height, width = images.shape
    shades = levels(images)
    colors = shades[:, :3] if channels >= 3 else np.repeat(shades[:, :1], 3, axis=1)
    columns = min(columns, count)
    rows = -(-count // columns)
    cells = np.empty((rows * columns, height, width, 3), np.uint8)
    cells[:] = _BACKGROUND
    cells[:count] = colors.transpose(0, 2, 3, 1)
    table = cells.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return table.reshape(rows * height, columns * width, 3).repeat(scale, axis=0).repeat(scale, axis=1)


def _fitted(title: str, width: int, font: Any) -> str:
    """Shortens a title that is wider than its grid."""
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(title + "...") > width:
        title = title[:-1]
    return title + "..."


def _save(canvas: Image.Image, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda stream: canvas.save(stream, format="PNG"))
    except OSError as error:
        raise UserError(f"cannot write the picture '{path}': {error.strerror or error}") from error
    return path
