"""Grids of images: every pixel where it belongs, and files that are whole."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mpq_compiler.evaluation.image_grid import grid
from mpq_compiler.support.errors import UserError

MARGIN = 8


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_pixels_are_where_they_belong(tmp_path):
    images = np.linspace(-1, 1, 5 * 4 * 3).reshape(5, 1, 4, 3)
    pixels = read(grid(images, tmp_path / "a.png", columns=3, scale=2))
    assert pixels.shape == (2 * 4 * 2 + 2 * MARGIN, 3 * 3 * 2 + 2 * MARGIN, 3)
    inner = pixels[MARGIN:-MARGIN, MARGIN:-MARGIN]
    second_row_first = inner[8:16, 0:6]
    expected = np.rint((images[3, 0] + 1) * 127.5).astype(np.uint8)
    assert np.array_equal(second_row_first[::2, ::2, 0], expected)
    assert np.array_equal(second_row_first[1::2, 1::2, 2], expected)
    assert (inner[8:, 12:] == 255).all()  # there is no sixth image


def test_two_grids_with_titles(tmp_path):
    left, right = np.full((4, 1, 8, 8), -1.0), np.full((4, 1, 8, 8), 1.0)
    pixels = read(
        grid([left, right], tmp_path / "a.png", columns=2, scale=4, titles=["float", "3.7 bits " * 9])
    )
    assert pixels.shape == (64 + 24 + 2 * MARGIN, 2 * 64 + 3 * MARGIN, 3)
    assert (pixels[-MARGIN - 64 : -MARGIN, MARGIN : MARGIN + 64] == 0).all()
    assert (pixels[-MARGIN - 64 : -MARGIN, 2 * MARGIN + 64 : -MARGIN] == 255).all()
    for start in (MARGIN, 2 * MARGIN + 64):
        assert (pixels[MARGIN : MARGIN + 20, start : start + 64] < 100).any()  # the caption
    assert (pixels[:, -MARGIN:] == 255).all()  # which does not run over


def test_colors_and_values_out_of_range(tmp_path):
    image = np.array([-5.0, 0.0, 5.0, 9.0]).reshape(1, 4, 1, 1)
    assert read(grid(image, tmp_path / "a.png", scale=1))[MARGIN, MARGIN].tolist() == [0, 128, 255]
    assert read(grid(image * np.nan, tmp_path / "b.png", scale=1))[MARGIN, MARGIN].tolist() == [128, 128, 128]


def test_same_images_same_bytes(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (6, 3, 5, 5))
    a, b = (grid(images, tmp_path / name, titles=["x"]).read_bytes() for name in ("a.png", "new/b.png"))
    assert a == b


def test_bad_input(tmp_path):
    images = np.zeros((2, 1, 4, 4))
    for bad in (images[0], [], [images, images[:1]], images[:0]):
        with pytest.raises(UserError, match="grids of one shape"):
            grid(bad, tmp_path / "a.png")
    with pytest.raises(UserError, match="title for every grid"):
        grid(images, tmp_path / "a.png", titles=["a", "b"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the picture"):
        grid(images, tmp_path / "file" / "a.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write the picture"):
        grid(images, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
