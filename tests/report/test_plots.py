"""The picture is drawn for one exit as for many, and for colour as for grey."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ssl_exit.report.plots import plot_exits


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_a_picture_is_drawn(fitted, rgb_digits, tmp_path, colour, early):
    images = rgb_digits[800:]
    c = copy.copy(fitted)
    if not early:
        cascade = c.model_.cascade
        c.model_ = replace(c.model_, cascade=cascade.at(np.full_like(cascade.thresholds, np.inf)))
    evaluation = c.evaluate(images)
    pictures = np.clip(images.permute(0, 2, 3, 1).numpy(), 0, 1)
    file = tmp_path / "exits.png"
    plot_exits(file, evaluation, pictures if colour else pictures[..., 0], fitted.trade_off(images), "a title")
    drawn = np.asarray(Image.open(file).convert("RGB"))
    assert drawn.shape[1] > 1000
    assert drawn.std() > 10
