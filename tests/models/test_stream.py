"""Streams: every decision equals ``forward`` of its window, whatever the chunks, batches and resets."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stvit_video.common.errors import UsageError
from stvit_video.config import load_config
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.stream import TokenStream
from stvit_video.models.weights.files import Checkpoint
from stvit_video.models.zoo import build_model
from tests.conftest import REPOSITORY
from tests.models.weights import perturb

PRESETS = ("paper", "balanced", "fast")
FRAMES, SIDE = 16, 64
SMALL = {"dim": 48, "num_heads": 3, "depth": 8}


def build(name: str = "stvit_vit_tiny_patch16", **overrides: object) -> nn.Module:
    """Return a model whose position in time and global centres are as large as its tokens."""
    sizes = {"num_frames": FRAMES, "image_size": SIDE, "num_classes": 10, "streaming": True}
    model = perturb(create_model(name, **{**sizes, **overrides}))
    for parameter in (model.time_embed, model.stgm.global_centres):
        nn.init.normal_(parameter)
    return model


def make_video(batch: int, frames: int) -> Tensor:
    """Return videos (B, 3, n, H, W) whose windows differ: brightness and contrast change all the time."""
    video = torch.randn(batch, 3, frames, SIDE, SIDE)
    return video * (0.5 + torch.rand(batch, 1, frames, 1, 1)) + torch.randn(batch, 3, frames, 1, 1)


def cut(rng: random.Random, groups: int, longest: int) -> Iterator[int]:
    """Yield chunks, in groups, that add up to ``groups``."""
    while groups:
        chunk = min(groups, rng.choice((1, 1, 2, 3, rng.randint(1, longest))))
        groups -= chunk
        yield chunk


def compare_with_windows(model: nn.Module, batch: int, frames: int, seed: int) -> int:
    """Push a video in random chunks, with resets of random rows between; return the number of windows compared."""
    rng, stream = random.Random(seed), model.stream(batch)
    video, position, starts, compared = make_video(batch, frames), 0, [0] * batch, 0
    for chunk in cut(rng, frames // stream.group, 2 * FRAMES // stream.group):
        if rng.random() < 0.15:
            rows = rng.sample(range(batch), rng.randint(1, batch))
            stream.reset(None if len(rows) == batch else rows)
            starts = [position if row in rows else start for row, start in enumerate(starts)]
        logits = stream.push(video[:, :, position : position + chunk * stream.group])
        ends = [position + stream.group * i for i in range(1, chunk + 1)]
        ends = [end for end in ends if any(end - start >= FRAMES for start in starts)]
        assert logits.shape == (batch, len(ends), 10)
        assert stream.ready.tolist() == [[end - start >= FRAMES for end in ends] for start in starts]
        assert torch.equal(logits.isnan().any(dim=-1), ~stream.ready)
        for i, end in enumerate(ends):
            with torch.no_grad():
                expected = model(video[:, :, end - FRAMES : end])
            ready = stream.ready[:, i]
            assert (logits[ready, i] - expected[ready]).abs().max() <= 1e-5 * expected.abs().max()
            compared += int(ready.sum())
        position += chunk * stream.group
    return compared


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stream_is_its_windows(preset: str) -> None:
    model = build(preset=preset)
    with torch.no_grad():
        windows = model(torch.cat([make_video(1, FRAMES) for _ in range(4)]))
    assert windows.std(dim=0).max() > 0.01 * windows.abs().max()  # else one window would pass for another
    assert sum(compare_with_windows(model, batch, 44, seed) for seed, batch in enumerate((1, 3))) > 15


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_streams_of_many_windows(size: str, preset: str) -> None:
    model, compared, seed = build(f"stvit_vit_{size}_patch16", preset=preset), 0, 0
    while compared < 120:
        compared += compare_with_windows(model, (1, 3)[seed % 2], 400, seed)
        seed += 1


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "max", "offsets": True, "stgm_depth": 3},
        {"fc_norm": True, "frames_per_centre": 4},
        {"regions": (1, 2, 3), "first_residual": False},
        {"preset": "fast", "tubelet": 1},
    ],
    ids=str,
)
def test_a_stream_is_its_windows_with_other_settings(settings: dict) -> None:
    model = build(**SMALL, **settings)
    assert compare_with_windows(model, 2, 64, 0) > 5


def test_a_push_of_one_window_is_forward_bit_for_bit() -> None:
    for preset in PRESETS:
        model, window = build(**SMALL, preset=preset), make_video(2, FRAMES)
        logits, seen = model.stream(2).push(window, return_intermediates=True)
        with torch.no_grad():
            expected, wanted = model(window, return_intermediates=True)
        assert torch.equal(logits[:, 0], expected)
        assert seen.grids == wanted.grids
        assert seen.tokens.keys() == wanted.tokens.keys() == {"embed", "base", "semantic", "final"}
        assert all(torch.equal(seen.tokens[stage], wanted.tokens[stage]) for stage in seen.tokens)
        assert torch.equal(seen.assignment, wanted.assignment)


def test_intermediates_of_new_frames_and_of_the_windows_of_decisions() -> None:
    model, video = build(**SMALL, preset="fast"), make_video(2, 28)
    stream = model.stream(2)
    _, seen = stream.push(video[:, :, :12], return_intermediates=True)
    assert "final" not in seen.grids
    assert (seen.grids["base"], seen.grids["semantic"]) == ((6, 4, 4), (3, 4, 4))
    _, seen = stream.push(video[:, :, 12:], return_intermediates=True)  # 4 groups, each of which ends a window
    assert (seen.grids["base"], seen.grids["final"]) == ((8, 4, 4), (16, 4, 4))
    windows = seen.tokens["final"].unflatten(1, (4, -1))
    with torch.no_grad():
        for i in range(4):
            _, wanted = model(video[:, :, 4 * i : 4 * i + 16], return_intermediates=True)
            torch.testing.assert_close(windows[:, i], wanted.tokens["final"])
    torch.testing.assert_close(stream.tokens, wanted.tokens["semantic"])
    torch.testing.assert_close(seen.assignment, wanted.assignment)


def test_decisions_are_made_where_they_are_wanted_only() -> None:
    model, video, decided = build(**SMALL), make_video(2, 48), []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: decided.append(len(output)))
    expected, stream = model.stream(2).push(video), model.stream(2)
    decided.clear()
    parts = [(0, 10, []), (10, 32, [0, 2, 6, 10]), (32, 48, [7])]
    found = [stream.push(video[:, :, start:stop], after=after) for start, stop, after in parts]
    assert [part.shape[1] for part in found] == [0, 3, 1]
    assert decided == [2 * 3, 2 * 1]
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, [0, 4, 8, 16]])
    for wrong in ([8], [1, 0], [0, 0], [-1]):
        with pytest.raises(ValueError, match=r"are 8 groups: give numbers from 0 to 7, each once"):
            stream.push(video[:, :, :16], after=wrong)


def test_every_frame_is_computed_once_and_nothing_piles_up() -> None:
    model, computed = build(**SMALL), []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: computed.append(output.shape[:2]))
    stream, video = model.stream(), make_video(1, 2)
    for _ in range(50):
        stream.push(video)
    assert computed == [(1, 16)] * 50  # one token frame of 4 x 4
    held = [value for value in vars(stream).values() if isinstance(value, Tensor)]
    assert sum(value.untyped_storage().nbytes() for value in held) <= 8 * 16 * 48 * 4 + 8


def test_a_saved_stream_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, video = build(**SMALL), make_video(2, 40)
    stream, other = model.stream(2), model.stream(2)
    stream.push(video[:, :, :14])
    stream.reset([1])
    stream.push(video[:, :, 14:20])
    torch.save(stream.state_dict(), tmp_path / "stream.pt")
    other.load_state_dict(torch.load(tmp_path / "stream.pt"))
    expected, found = stream.push(video[:, :, 20:]), other.push(video[:, :, 20:])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(stream.ready, other.ready)
    assert not stream.ready.all()
    with pytest.raises(ValueError, match=r"this one takes \{'tokens': \(1, 128, 48\), 'filled': \(1,\), 'weights'"):
        model.stream(1).load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match=r"filled \[9, 8\]; this one takes 0 to 8 groups"):
        stream.load_state_dict({**stream.state_dict(), "filled": torch.tensor([9, 8])})
    nn.init.zeros_(model.head.proj.bias)
    with pytest.raises(ValueError, match="other weights"):
        stream.load_state_dict(torch.load(tmp_path / "stream.pt"))


def test_a_broken_camera_spoils_only_its_own_row_and_only_until_its_reset() -> None:
    model, video = build(**SMALL), make_video(2, 40)
    healthy, stream = model.stream(2), model.stream(2)
    broken = video.clone()
    broken[1, :, :10] = torch.nan
    expected, found = healthy.push(video[:, :, :20]), stream.push(broken[:, :, :20])
    assert torch.equal(found[0], expected[0])
    assert found[1].isnan().all()
    for each in (healthy, stream):
        each.reset(torch.tensor([False, True]))
        assert not each.tokens[1].any()
        assert each.tokens[0].any()
    expected, found = healthy.push(video[:, :, 20:]), stream.push(broken[:, :, 20:])
    assert stream.ready[1].any()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_a_stream_in_bf16_is_its_windows(preset: str) -> None:
    model, video = build(**SMALL, preset=preset), make_video(1, 24)
    half = copy.deepcopy(model).bfloat16()
    for network, frames, autocast in ((model, video, True), (half, video.bfloat16(), False)):
        stream = network.stream()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = torch.cat([stream.push(chunk) for chunk in frames.split(stream.group, dim=2)], dim=1)
            windows = [network(frames[:, :, i : i + FRAMES]) for i in range(0, 24 - FRAMES + 1, stream.group)]
        expected = torch.stack(windows, dim=1)
        assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def compare_compiled(model: nn.Module, stream: TokenStream) -> None:
    video, eager = make_video(1, FRAMES + 4), copy.deepcopy(model).stream()
    for chunk in video.split(stream.group, dim=2):
        found, expected = stream.push(chunk), eager.push(chunk)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() if expected.numel() else not found.numel()
    torch.compiler.reset()


def test_a_compiled_stream_is_the_same() -> None:
    model = build(**{**SMALL, "depth": 4})
    stream = model.stream()
    stream.compile(backend="eager", fullgraph=True)
    compare_compiled(model, stream)


@pytest.mark.long
def test_a_stream_of_compiled_blocks_is_the_same() -> None:
    model = build(**{**SMALL, "depth": 6})
    plain = copy.deepcopy(model)
    for block in model.transformer_blocks():
        block.compile()
    compare_compiled(plain, model.stream())


@pytest.mark.parametrize("preset", PRESETS)
def test_order_counts_among_groups_and_inside_them(preset: str) -> None:
    model, clip = build(**SMALL, preset=preset), make_video(1, FRAMES)
    pairs = clip.unflatten(2, (-1, 2))  # token frames
    halves = pairs.unflatten(2, (-1, 2)).flip(3).flatten(2, 3)  # neighbours change places
    with torch.no_grad():
        for other in (pairs.flip(2), halves):
            assert (model(other.flatten(2, 3)) - model(clip)).abs().max() > 1e-3 * model(clip).abs().max()


def made_by(model: nn.Module) -> Checkpoint:
    """Return what a file of the model holds."""
    metadata = {"name": model.name, "arguments": model.arguments}
    return Checkpoint("file", {key: value.clone() for key, value in model.state_dict().items()}, metadata)


def test_an_image_model_of_any_form_starts_one_with_equal_still_clips() -> None:
    image = torch.randn(2, 3, 1, SIDE, SIDE)
    for streaming in (False, True):
        image_model = build(**SMALL, num_frames=1, preset="fast", streaming=streaming)
        model = build(**SMALL, preset="fast")
        report = load_pretrained(model, made_by(image_model), min_coverage=1.0)
        assert not report.differences
        with torch.no_grad():
            expected, found = image_model(image), model(image.expand(-1, -1, FRAMES, -1, -1))
        assert (found - expected).abs().max() < 1e-4


def test_a_clip_model_of_the_earlier_form_starts_one_with_a_note() -> None:
    earlier, model = build(**SMALL, streaming=False), build(**SMALL)
    for source in (made_by(earlier), earlier.state_dict()):
        report = load_pretrained(model, source, min_coverage=1.0)
        assert set(report.keys["interpolated"]) == {"time_embed", "stgm.global_centres"}
        assert "positions are added to the semantic tokens" in report.differences[0]
        torch.testing.assert_close(model.time_embed.mean(dim=1), torch.zeros(1, 48))
        torch.testing.assert_close(
            model.pos_embed.unsqueeze(1) + model.time_embed.unsqueeze(2),
            earlier.pos_embed.unsqueeze(1) + earlier.time_embed.unsqueeze(2),
        )
        centres = earlier.stgm.global_centres.reshape(8, 16, 48).mean(dim=0, keepdim=True)
        torch.testing.assert_close(model.stgm.global_centres, centres)
    report = load_pretrained(earlier, made_by(model), min_coverage=1.0)
    assert "set MODEL.STREAMING True" in report.differences[0]
    assert not load_pretrained(build(**SMALL), made_by(model), min_coverage=1.0).differences


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("stvit_vit_tiny_patch16", {"positions": "clip"}, "streaming takes positions 'frame'"),
        ("stvit_vit_tiny_patch16", {"base_attention": "joint"}, "streaming takes base_attention 'frame'"),
        ("stvit_vit_tiny_patch16", {"reducer": "tome"}, "streaming takes reducer 'stgm' or 'mean'"),
        ("stvit_vit_tiny_patch16", {"reducer": "random"}, "reducer 'random' needs the whole clip"),
        ("stvit_vit_tiny_patch16", {"regions": (3, 4, 4)}, "3 regions do not divide the 8 token frames"),
        ("vit_tiny_patch16", {}, "use stvit_vit_tiny_patch16"),
        ("stvit_swin_tiny", {}, "takes no argument 'streaming'"),
    ],
)
def test_what_cannot_stream_is_refused(name: str, settings: dict, says: str) -> None:
    sizes = {"num_frames": FRAMES, "image_size": SIDE, "num_classes": 10, "streaming": True}
    with pytest.raises(UsageError) as error:
        create_model(name, **sizes, **settings)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_use_is_one_line_and_leaves_the_stream_as_it_was() -> None:
    with pytest.raises(UsageError, match=r"MODEL\.STREAMING True"):
        build(**SMALL, streaming=False).stream()
    model = build(**SMALL, preset="fast")
    stream = model.stream(2)
    assert (stream.group, stream.batch_size) == (4, 2)
    stream.push(make_video(2, 8))
    before = stream.state_dict()
    for shape in ((2, 3, 6, 64, 64), (2, 3, 0, 64, 64), (1, 3, 4, 64, 64), (2, 3, 4, 64, 80), (3, 4, 64, 64)):
        with pytest.raises(ValueError, match=r"this stream takes \(2, 3, n, 64, 64\), n a multiple of its group of 4"):
            stream.push(torch.zeros(shape))
    with pytest.raises(ValueError, match="row 2 of a stream of 2; allowed: 0 to 1"):
        stream.reset([0, 2])
    with pytest.raises(ValueError, match=r"call model\.eval"):
        (model.train(), stream.push(make_video(2, 4)))
    with pytest.raises(ValueError, match="batch_size 0"):
        model.stream(0)
    assert all(torch.equal(value, before[key]) for key, value in stream.state_dict().items())


def test_the_configuration_builds_it() -> None:
    cfg = load_config(REPOSITORY / "configs/sample_stvit.yaml", ["MODEL.STREAMING", "True"])
    assert build_model(cfg, 8).stream().group == 2
    assert not build_model(load_config(REPOSITORY / "configs/sample_stvit.yaml"), 8).streaming
