"""Transforms, with torchvision's own classes as oracles."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2

from stvit_video.data.clips.transforms import Augment, Normalise, TestViews, TrainViews

NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FRAMES = np.random.default_rng(0).integers(0, 256, (4, 60, 90, 3), dtype=np.uint8)
CLIP = torch.from_numpy(FRAMES).permute(0, 3, 1, 2)  # (T, 3, H, W)
CHOICES = np.random.default_rng


def oracle(*steps: torch.nn.Module) -> torch.Tensor:
    normalise = v2.Normalize(NORMALISE.mean, NORMALISE.std)
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), normalise])(CLIP).transpose(0, 1)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return NORMALISE(pixels, torch.empty(3, *pixels.shape[:3], device=pixels.device))


def train_views(**settings: object) -> TrainViews:
    defaults = {"size": 32, "normalise": NORMALISE, "short_side": (32, 48), "ratio": (0.75, 1.33)}
    return TrainViews(**{**defaults, "clips": 1, "frames": 4, **settings})


def train(**settings: object) -> Callable[[np.ndarray | torch.Tensor, np.random.Generator], torch.Tensor]:
    """Return what maps frames to a training clip, drawing from a generator."""
    views = train_views(**settings)
    return lambda frames, rng: views.augment.cover(normalised(views.crop(torch.as_tensor(frames), rng)), rng)


def eval_views(frames: np.ndarray, size: int, short_side: int, crops: int) -> torch.Tensor:
    """Return the views (crops, 3, T, size, size) of one clip."""
    views = TestViews(clips=1, crops=crops, frames=len(frames), size=size, normalise=NORMALISE, short_side=short_side)
    pixels = views.prepare(frames)
    out = torch.empty(views.different_crops(pixels.shape), 3, len(frames), size, size)
    views.finish(pixels, (), out)
    return out


def test_one_centred_view_equals_torchvision() -> None:
    views = eval_views(FRAMES, 40, 48, crops=1)
    expected = oracle(v2.Resize(48, antialias=True), v2.CenterCrop(40))
    torch.testing.assert_close(views, expected[None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("portrait", [False, True])
def test_three_crops_lie_along_the_longer_side(portrait: bool) -> None:
    frames = FRAMES.transpose(0, 2, 1, 3) if portrait else FRAMES
    views = eval_views(np.ascontiguousarray(frames), 60, 60, crops=3)
    clip = normalised(torch.from_numpy(np.ascontiguousarray(frames)))
    clip = clip.transpose(-2, -1) if portrait else clip
    expected = torch.stack([clip[..., :60], clip[..., 15:75], clip[..., 30:]])
    torch.testing.assert_close(views.transpose(-2, -1) if portrait else views, expected)


def test_training_crop_of_the_file_size_is_a_plain_crop() -> None:
    """Short side 60 of frames of 60 pixels resizes nothing, so the crop is a part of the original frames."""
    clip = train(short_side=(60, 60))(FRAMES, np.random.default_rng(3))
    places = CLIP.unfold(2, 32, 1).unfold(3, 32, 1)  # (T, 3, rows, columns, 32, 32)
    raw = clip.transpose(0, 1) * torch.tensor(NORMALISE.std).view(3, 1, 1) + torch.tensor(NORMALISE.mean).view(3, 1, 1)
    raw = (raw * 255).round().to(torch.uint8)
    matches = (places == raw[:, :, None, None]).all(dim=(0, 1, 4, 5))
    assert matches.sum() == 1


def test_the_generator_determines_the_clip() -> None:
    for transform in (train(flip=True), train(area=(0.2, 1.0))):
        first, again, other = (transform(FRAMES, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.shape == (3, 4, 32, 32)


def test_a_clip_stays_on_the_device_of_its_frames() -> None:
    """A fake GPU tensor refuses to mix devices, but has no values, which augmentation needs: there, a meta tensor."""
    for seed in range(20):
        with FakeTensorMode():
            frames = torch.empty(FRAMES.shape, dtype=torch.uint8, device="cuda")
            assert train(flip=True)(frames, CHOICES(seed)).device.type == "cuda"
        frames = torch.empty(FRAMES.shape, dtype=torch.uint8, device="meta")
        clip = train(area=(0.2, 1.0), augment=Augment(2, 9, 0.4, 1.0))(frames, CHOICES(seed))
        assert (clip.device.type, clip.shape) == ("meta", (3, 4, 32, 32))


def test_colours_change_before_normalisation_erasing_after() -> None:
    frames = FRAMES[:, :32, :32]  # nothing to crop, so that no choice is drawn before those of the augmentation
    clip = CLIP[..., :32, :32]
    pixels = torch.from_numpy(np.ascontiguousarray(frames))
    for seed in range(10):
        distorted = train(short_side=(32, 32), augment=Augment(2, 9, 0.4))(frames, CHOICES(seed))
        assert torch.equal(distorted, normalised(Augment(2, 9, 0.4).distort(clip, CHOICES(seed)).permute(0, 2, 3, 1)))
        erased = train(short_side=(32, 32), augment=Augment(erase=1.0))(frames, CHOICES(seed))
        assert torch.equal(erased, Augment(erase=1.0).cover(normalised(pixels), CHOICES(seed)))


def test_flip_mirrors_half_of_the_clips() -> None:
    ramp = np.broadcast_to(np.arange(90, dtype=np.uint8)[None, None, :, None], (2, 60, 90, 3)).copy()
    rng = np.random.default_rng(0)

    def mirrored(flip: bool) -> float:
        clips = [train(flip=flip)(ramp, rng) for _ in range(200)]
        return sum(bool(clip[0, 0, 0, 0] > clip[0, 0, 0, -1]) for clip in clips) / 200

    assert mirrored(flip=False) == 0
    assert 0.4 < mirrored(flip=True) < 0.6


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (200, 21), (33, 33), (1, 1)])
def test_any_frame_size_gives_the_clip_size(height: int, width: int) -> None:
    frames = np.zeros((2, height, width, 3), np.uint8)
    for transform in (train(), train(area=(0.08, 1.0))):
        assert transform(frames, np.random.default_rng(0)).shape == (3, 2, 32, 32)
    different = 1 if height == width else 3  # of a square picture, each crop is all of it
    assert eval_views(frames, 32, 32, crops=3).shape == (different, 3, 2, 32, 32)


def test_random_resized_crop_draws_areas_in_range() -> None:
    views, rng = train_views(area=(0.25, 0.5), ratio=(0.8, 1.25)), np.random.default_rng(0)
    boxes = [views._box(600, 900, rng) for _ in range(300)]
    areas = np.array([h * w / (600 * 900) for _, _, h, w in boxes])
    ratios = np.array([w / h for _, _, h, w in boxes])
    assert 0.24 < areas.min() < 0.27 < 0.47 < areas.max() < 0.51
    assert 0.79 < ratios.min() < 0.85 < 1.2 < ratios.max() < 1.26
