"""Augmentation of clips: torchvision's functional operations and closed forms as oracles."""

from math import degrees

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from stvit_video.data.clips.transforms import Augment, torch_draws_from

CLIP = F.resize(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 9, 12), dtype=np.uint8)), [24, 32])
CHOICES = np.random.default_rng


def randaugment_at_nine() -> dict[str, torch.Tensor]:
    """Return the result of each operation of RandAugment at magnitude 9 of 30, which is 0.3 of its range."""

    def moved(
        angle: float = 0.0, translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0, 0)
    ) -> torch.Tensor:
        middle = [0, 0] if any(shear) else None
        return F.affine(CLIP, angle, list(translate), 1.0, list(shear), InterpolationMode.BILINEAR, center=middle)

    shear, right, down = degrees(np.arctan(0.09)), int(0.3 * 150 / 331 * 32), int(0.3 * 150 / 331 * 24)
    results = {
        "identity": CLIP,
        "posterize": F.posterize(CLIP, 7),
        "solarize": F.solarize(CLIP, 0.7 * 255),
        "autocontrast": F.autocontrast(CLIP),
        "equalize": F.equalize(CLIP),
    }
    for sign in (-1, 1):
        results[f"shear x {sign}"] = moved(shear=(sign * shear, 0))
        results[f"shear y {sign}"] = moved(shear=(0, sign * shear))
        results[f"translate x {sign}"] = moved(translate=(sign * right, 0))
        results[f"translate y {sign}"] = moved(translate=(0, sign * down))
        results[f"rotate {sign}"] = F.rotate(CLIP, sign * 9.0, InterpolationMode.BILINEAR)
        results[f"brightness {sign}"] = F.adjust_brightness(CLIP, 1 + sign * 0.27)
        results[f"colour {sign}"] = F.adjust_saturation(CLIP, 1 + sign * 0.27)
        results[f"contrast {sign}"] = F.adjust_contrast(CLIP, 1 + sign * 0.27)
        results[f"sharpness {sign}"] = F.adjust_sharpness(CLIP, 1 + sign * 0.27)
    return results


def test_randaugment_applies_one_known_operation_per_layer_and_never_mirrors() -> None:
    known, seen = randaugment_at_nine(), set()
    for seed in range(300):
        clip = Augment(layers=1, magnitude=9).distort(CLIP, CHOICES(seed))
        distance = {name: (clip.float() - result.float()).abs().mean().item() for name, result in known.items()}
        nearest = min(distance, key=distance.__getitem__)
        assert distance[nearest] < 0.1, f"seed {seed} is no known operation; nearest: {nearest}"  # of 255, for rounding
        seen.add(nearest)
    assert seen == set(known)


def test_all_frames_of_a_clip_are_augmented_alike() -> None:
    augment, changed = Augment(layers=2, magnitude=20, jitter=0.4), 0
    for seed in range(30):
        clip = augment.distort(CLIP, CHOICES(seed))
        alone = [augment.distort(frame[None], CHOICES(seed)) for frame in CLIP]
        assert torch.equal(clip, torch.cat(alone))
        assert (clip.dtype, clip.shape) == (torch.uint8, CLIP.shape)
        changed += not torch.equal(clip, CLIP)
    assert changed > 27


def test_jitter_changes_brightness_up_to_its_strength() -> None:
    """Grey without detail has no contrast or saturation to change, so its brightness factor can be read."""
    grey = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    clips = [Augment(jitter=0.4).distort(grey, CHOICES(seed)) for seed in range(200)]
    assert all(clip.unique().numel() == 1 for clip in clips)
    levels = torch.stack([clip[0, 0, 0, 0] for clip in clips])
    assert 57 <= levels.min() < 65 < 135 < levels.max() <= 140  # a grey value loses 1 in each of three roundings


def test_erasing_fills_one_box_of_all_frames_with_noise() -> None:
    shares, noise = [], []
    for seed in range(300):
        clip = Augment(erase=0.25).cover(torch.zeros(3, 4, 40, 40), CHOICES(seed))
        covered = clip[0, 0] != 0
        if not covered.any():
            assert not clip.any()
            continue
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
        assert torch.equal(clip[:, 0] != 0, covered.expand(3, -1, -1))
        assert torch.equal(covered, covered.any(1, keepdim=True) & covered.any(0, keepdim=True))
        shares.append(covered.float().mean())
        noise.append(clip[:, 0][covered.expand(3, -1, -1)])
    assert 0.18 < len(shares) / 300 < 0.32
    assert min(shares) > 0.015
    assert 0.25 < max(shares) < 0.35
    assert torch.cat(noise).mean().abs() < 0.02
    assert torch.cat(noise).std() == pytest.approx(1, abs=0.02)


def test_augmentation_draws_from_its_generator_only() -> None:
    def run(seed: int) -> torch.Tensor:
        augment, rng = Augment(2, 15, 0.4, 1.0), CHOICES(seed)
        return augment.cover(augment.distort(CLIP, rng).transpose(0, 1).float(), rng)

    torch.manual_seed(1)
    np.random.seed(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, other = run(3), run(4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(2)
    assert torch.equal(run(3), first)
    assert not torch.equal(first, other)


def test_the_global_generator_is_restored_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), torch_draws_from(5):
        torch.rand(3) @ torch.rand(4)
    assert torch.equal(torch.get_rng_state(), state)


def test_disabled_augmentation_draws_no_random_numbers() -> None:
    rng = CHOICES(0)
    clip = torch.zeros(3, 2, 8, 8)
    assert Augment().distort(CLIP, rng) is CLIP
    assert Augment().cover(clip, rng) is clip
    assert rng.bit_generator.state == CHOICES(0).bit_generator.state
