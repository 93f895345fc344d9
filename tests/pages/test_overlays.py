"""Painting marks the right pixels, and no others."""

import numpy as np
import pytest

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


@pytest.mark.parametrize("key", ["drawn", "gradcam", "attention", "contributions", "owners"])
def test_a_square_has_the_colour_of_its_value_on_the_scale(key: str) -> None:
    """Also over a frame that is black here and white there."""
    rng = np.random.default_rng(0)
    frames = overlays.fade(rng.integers(0, 256, (4, 50, 70, 3), dtype=np.uint8))
    frames[:, :25, :35], frames[:, 25:, :35] = 0, 255
    values, owners = rng.lognormal(sigma=1, size=(2, 4, 3)), rng.integers(0, 9, (2, 4, 3))
    explanation = Explanation(
        np.ones(1), 0, values / values.max(), assignment=np.ones((9, 2, 4, 3)), regions=(1, 3, 3), drawn=values,
        owners=owners, attention=values, contributions=0.1 + values,
    )  # fmt: skip
    (layer,) = (layer for layer in overlays.build_layers(explanation, frames, "a class") if layer.key == key)
    painted = layer.frames.astype(float)
    for place in np.ndindex(values.shape):
        rows, columns = (np.arange(n) * k // n == i for n, k, i in zip((50, 70), (4, 3), place[1:], strict=True))
        seen, frame = (pictures[2 * place[0]][np.ix_(rows, columns)] for pictures in (painted, frames))
        if layer.scale is None:
            seen, frame = seen[2:-2, 2:-2], frame[2:-2, 2:-2]  # a white line may be at the edge
            expected, tolerance = layer.regions.reshape(-1, 3)[owners[place]], 4.0  # as the texture is not whole
        else:
            top = float(max(layer.scale["ticks"])[1])
            if key == "gradcam":
                share = values[place] / values.max()
            elif key == "contributions":
                share = 0.5 + (values[place] - values.mean()) / (2 * top)
            else:
                share = np.log(values[place]) / np.log(top)
            colours = np.array(layer.scale["colours"])
            expected = [np.interp(share, np.linspace(0, 1, len(colours)), channel) for channel in colours.T]
            tolerance = 2.5
        if key in ("drawn", "attention", "owners") and values[place] <= 1:
            assert (seen == frame).all(), place
        else:
            assert np.abs(seen.mean(axis=(0, 1)) - expected).max() < tolerance, place


def test_contributions_are_shown_against_their_mean() -> None:
    parts = np.array([[[5.01, 5.02], [4.97, 0.0]]])  # 0: a token that was dropped
    share, mean, top = overlays.contrast(parts)
    assert mean == pytest.approx(5)
    assert top == pytest.approx(0.03)
    np.testing.assert_allclose(share, [[[1 / 3, 2 / 3], [-1, 0]]], atol=1e-6)
    for same in (np.full((1, 2, 2), 3.0) + 1e-7 * parts, np.zeros((1, 2, 2))):
        assert np.abs(overlays.contrast(same)[0]).max() < 1e-3, "rounding errors look like differences"
    frames = np.full((1, 40, 40, 3), 128, np.uint8)
    explanation = Explanation(np.ones(1), 0, np.zeros((1, 2, 2)), contributions=parts)
    layer = overlays.build_layers(explanation, frames, "a class")[-1]
    red, _, blue = layer.frames[0].astype(int).transpose(2, 0, 1)
    assert red[10, 30] - blue[10, 30] > red[10, 10] - blue[10, 10] > 0 > red[30, 10] - blue[30, 10]
    assert (layer.frames[0, 20:, 20:] == 128).all()
    assert "+5 each on average, from which none differs by more than 0.03" in layer.caption


def test_neighbouring_regions_have_different_colours() -> None:
    for side in range(2, 13):
        colours = overlays.region_colours((1, side, side)).astype(int)
        assert (np.abs(np.diff(colours, axis=0)).sum(axis=-1) > 60).all(), side
        assert (np.abs(np.diff(colours, axis=1)).sum(axis=-1) > 60).all(), side
