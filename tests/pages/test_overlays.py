"""Painting marks the right pixels, and no others."""

import numpy as np

from stvit_video.pages import overlays
from stvit_video.pages.explain import Explanation


def test_painting_marks_the_right_tokens_only() -> None:
    frames = np.full((4, 40, 40, 3), (200, 100, 50), np.uint8)
    values = np.ones((2, 4, 4))
    values[1, 2, 3] = 8
    explanation = Explanation(
        np.ones(1), 0, np.zeros((2, 4, 4)),
        assignment=np.ones((9, 2, 4, 4)), regions=(1, 3, 3), drawn=values, owners=np.full((2, 4, 4), 5),
    )  # fmt: skip
    layers = {layer.key: layer.frames for layer in overlays.build_layers(explanation, frames, "a class")}
    changed = (layers["drawn"] != overlays.fade(frames)).any(axis=-1)
    expected = np.zeros((4, 40, 40), bool)
    expected[2:, 20:30, 30:40] = True
    np.testing.assert_array_equal(changed, expected)
    painted = layers["owners"].astype(int)
    inside = painted[2:, 22:28, 32:38]
    red, green, blue = overlays.region_colours((1, 3, 3))[1, 2]
    assert np.ptp(inside, axis=(0, 1, 2)).max() == 0
    assert abs(inside[0, 0, 0] - (red, green, blue)).max() < 25
    assert (painted[:2] == overlays.fade(frames)[:2]).all()


def test_neighbouring_regions_have_different_colours() -> None:
    for side in range(2, 13):
        colours = overlays.region_colours((1, side, side)).astype(int)
        assert (np.abs(np.diff(colours, axis=0)).sum(axis=-1) > 60).all(), side
        assert (np.abs(np.diff(colours, axis=1)).sum(axis=-1) > 60).all(), side
