"""MixUp and CutMix of batches: closed forms as oracles."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stvit_video.data.clips.transforms import Mix

CLIPS = torch.rand(4, 3, 2, 11, 13, generator=torch.Generator().manual_seed(0))  # no box is half of 11 x 13
LABELS = torch.tensor([2, 0, 4, 1])


def mix(seed: int, **settings: float) -> tuple[Tensor, Tensor]:
    defaults = {"mixup": 0.0, "cutmix": 0.0, "probability": 1.0, "switch": 0.5}
    return Mix(**{**defaults, **settings}, num_classes=5)(CLIPS, LABELS, seed)


def sources(shares: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the larger share, and for each mixed clip the clip with that share (B, ...) and the other (B, ...).

    Each clip has its own label here, so the shares of the labels identify the clips.
    """
    of_clips = shares[:, LABELS]
    torch.testing.assert_close(of_clips.sum(dim=1), torch.ones(4))
    (large, _), (first, second) = (part.T for part in of_clips.topk(2))
    torch.testing.assert_close(large, large[:1].expand(4))
    assert first.unique().numel() == 4  # every clip is used
    return large[0].item(), CLIPS[first], CLIPS[second]


def is_blend(clips: Tensor, shares: Tensor) -> bool:
    large, first, second = sources(shares)
    return torch.allclose(clips, large * first + (1 - large) * second, atol=1e-5)


def test_mixup_blends_clips_and_labels_alike() -> None:
    larger = []
    for seed in range(50):
        clips, shares = mix(seed, mixup=1.0)
        assert is_blend(clips, shares)
        assert type(clips) is Tensor
        larger.append(shares.max().item())
    assert min(larger) < 0.6  # Beta(1, 1) is uniform
    assert max(larger) > 0.95


def test_cutmix_pastes_one_box_with_the_area_of_its_label_share() -> None:
    larger = []
    for seed in range(50):
        clips, shares = mix(seed, cutmix=1.0)
        large, first, second = sources(shares)
        from_first = (clips == first).all(dim=(0, 1, 2))
        assert torch.equal(clips, torch.where(from_first, first, second))
        assert from_first.float().mean().item() == pytest.approx(large, abs=1e-6)
        assert any(torch.equal(box, box.any(1, keepdim=True) & box.any(0)) for box in (from_first, ~from_first))
        larger.append(large)
    assert min(larger) < 0.65
    assert max(larger) > 0.9


def test_probability_and_switch_are_relative_frequencies() -> None:
    blended = cut = untouched = 0
    for seed in range(300):
        clips, shares = mix(seed, mixup=1.0, cutmix=1.0, probability=0.6, switch=0.25)
        if torch.equal(clips, CLIPS):
            untouched += 1
            assert torch.equal(shares, torch.eye(5)[LABELS])
        elif is_blend(clips, shares):
            blended += 1
        else:
            cut += 1
    assert untouched / 300 == pytest.approx(0.4, abs=0.08)
    assert cut / (cut + blended) == pytest.approx(0.25, abs=0.08)


def test_mix_shuffles_pairs() -> None:
    """Repeated clips of a video are neighbours."""
    pairs = [set(row.nonzero().flatten().tolist()) for seed in range(200) for row in mix(seed, mixup=1.0)[1]]
    partners = [len(pair & {0}) for pair in pairs if 2 in pair]  # labels 2 and 0 are those of the first two clips
    assert sum(partners) / len(partners) == pytest.approx(1 / 3, abs=0.08)


def test_mixing_depends_on_the_seed_only() -> None:
    both = {"mixup": 0.8, "cutmix": 1.0}
    state = torch.get_rng_state()
    first, other = mix(1, **both), mix(2, **both)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert all(map(torch.equal, mix(1, **both), first))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("kind", ["TRAIN.MIXUP", "TRAIN.CUTMIX"])
def test_mixing_needs_two_clips(
    small_run: Callable[..., list[str]], refused: Callable[[list[str]], str], kind: str
) -> None:
    said = refused(small_run(kind, "0.5", "TRAIN.BATCH_SIZE", "4", "TRAIN.ACCUMULATE", "4"))
    for part in ("TRAIN.BATCH_SIZE 4 over 1 processes x TRAIN.ACCUMULATE 4", "no other video", "raise it to 8", kind):
        assert part in said
