"""Pooling and the generator, against loops and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from stvit_video.models.arguments import STGMArguments
from stvit_video.models.layers import Block
from stvit_video.models.reducers.semantic import (
    SemanticPooling,
    SemanticTokenGenerator,
    allowed_counts,
    default_regions,
    split_axis,
)

DIM = 16


def test_paper_example_of_padding() -> None:
    assert split_axis(14, 4, "height") == (4, 1, 1)
    assert default_regions((1, 14, 14)) == (1, 4, 4)
    assert default_regions((8, 14, 14), frames_per_centre=2) == (4, 4, 4)
    assert default_regions((3, 5, 2), frames_per_centre=2) == (3, 3, 2)


@pytest.mark.parametrize("length", range(1, 25))
def test_every_allowed_split_covers_the_axis_with_no_empty_region(length: int) -> None:
    for count in range(1, length + 1):
        if count in allowed_counts(length):
            size, before, after = split_axis(length, count, "width")
            assert size * count == before + length + after
            covered = [min((i + 1) * size, before + length) - max(i * size, before) for i in range(count)]
            assert min(covered) > 0
        else:
            with pytest.raises(ValueError, match="allowed for this width"):
                split_axis(length, count, "width")


def masked_centres_by_loop(pooling: SemanticPooling, x: torch.Tensor) -> torch.Tensor:
    """The mask pooling, position by position, without padding: an oracle for one clip (1, N, C)."""
    (T, H, W), (t, h, w) = pooling.grid, pooling.regions
    maps = x.reshape(T, H, W, -1).permute(0, 3, 1, 2)
    logits = pooling.mask_proj(F.gelu(pooling.mask_norm(pooling.mask_conv(maps).permute(0, 2, 3, 1))))[..., 0]
    grid, (row, top, _), (column, left, _) = x.reshape(T, H, W, -1), pooling.rows, pooling.columns
    centres = []
    for k in range(t):
        for i in range(h):
            for j in range(w):
                places = [
                    (frame, y, z)
                    for frame in range(k * T // t, (k + 1) * T // t)
                    for y in range(max(0, i * row - top), min(H, (i + 1) * row - top))
                    for z in range(max(0, j * column - left), min(W, (j + 1) * column - left))
                ]
                weights = torch.stack([logits[place] for place in places]).softmax(dim=0)
                centres.append(sum(weight * grid[place] for weight, place in zip(weights, places, strict=True)))
    return torch.stack(centres)[None]


@pytest.mark.parametrize(
    ("grid", "regions"), [((1, 14, 14), (1, 4, 4)), ((4, 7, 5), (2, 3, 3)), ((2, 4, 4), (1, 4, 4))]
)
def test_mask_pooling_equals_a_loop_over_the_unpadded_map(grid: tuple, regions: tuple) -> None:
    pooling = SemanticPooling(DIM, grid, regions, "mask")
    x = torch.randn(1, math.prod(grid), DIM)
    torch.testing.assert_close(pooling(x), masked_centres_by_loop(pooling, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "oracle"), [("max", torch.nn.AdaptiveMaxPool2d), ("mean", torch.nn.AdaptiveAvgPool2d)]
)
def test_plain_pooling_equals_torch(kind: str, oracle: type) -> None:
    x = torch.randn(2, 49, DIM)
    expected = oracle((3, 3))(x.transpose(1, 2).reshape(2, DIM, 7, 7)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(SemanticPooling(DIM, (1, 7, 7), (1, 3, 3), kind)(x), expected)


@pytest.mark.parametrize("kind", ["mask", "max", "mean"])
def test_offsets_start_as_the_intra_window_form(kind: str) -> None:
    settings = STGMArguments(pooling=kind, offsets=True)  # type: ignore[arg-type]
    generator = SemanticTokenGenerator(DIM, (2, 14, 14), (2, 4, 4), settings)
    generator.reset_parameters()
    with_offsets = generator.pooling
    without = SemanticPooling(DIM, (2, 14, 14), (2, 4, 4), kind)
    without.load_state_dict(with_offsets.state_dict(), strict=False)
    x = torch.randn(2, 2 * 196, DIM)
    torch.testing.assert_close(with_offsets(x), without(x), atol=1e-5, rtol=1e-5)


def test_an_offset_of_whole_tokens_pools_the_shifted_map() -> None:
    pooling = SemanticPooling(DIM, (1, 8, 8), (1, 2, 2), "mean", offsets=True)
    torch.nn.init.zeros_(pooling.offset_proj.weight)
    # tanh(b) times the region's 4 tokens is one token to the right and none down
    pooling.offset_proj.bias.data = torch.tensor([math.atanh(1 / 4), 0.0])
    x = torch.randn(1, 64, DIM)
    maps = x.reshape(1, 8, 8, DIM)
    shifted = torch.cat([maps[:, :, 1:], maps[:, :, -1:]], dim=2)  # the border repeats
    expected = F.adaptive_avg_pool2d(shifted.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooling(x), expected, atol=1e-5, rtol=1e-5)


def test_regions_must_divide_time() -> None:
    with pytest.raises(ValueError, match=r"allowed: \[1, 2, 4\]"):
        SemanticPooling(DIM, (4, 8, 8), (3, 4, 4))


@pytest.mark.parametrize("first_residual", [True, False])
@pytest.mark.parametrize("global_centres", [True, False])
def test_generator_computes_the_papers_equations(first_residual: bool, global_centres: bool) -> None:
    settings = STGMArguments(global_centres=global_centres, first_residual=first_residual)
    stgm = SemanticTokenGenerator(DIM, (1, 8, 8), (1, 4, 4), settings)
    stgm.reset_parameters()
    blocks = [Block(DIM, 2).eval() for _ in range(3)]
    x = torch.randn(2, 64, DIM)

    def attend(block: Block, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """torch's own multi-head attention with the block's weights."""
        oracle = torch.nn.MultiheadAttention(DIM, 2, batch_first=True)
        oracle.in_proj_weight.data, oracle.in_proj_bias.data = block.attn.qkv.weight.data, block.attn.qkv.bias.data
        oracle.out_proj.load_state_dict(block.attn.proj.state_dict())
        return oracle(block.norm1(q), block.norm1(kv), block.norm1(kv))[0]

    p = stgm.pooling(x)
    s = attend(blocks[0], p, x) + (p if first_residual else 0)
    s = s + blocks[0].mlp(blocks[0].norm2(s))
    for block in blocks[1:]:
        q = s + (stgm.global_centres if global_centres else 0)
        s = q + attend(block, q, torch.cat([s, x], dim=1))
        s = s + block.mlp(block.norm2(s))
    torch.testing.assert_close(stgm(x, blocks).tokens, s, atol=1e-5, rtol=1e-5)


def test_log_n_counts_a_merged_key_n_times() -> None:
    block = Block(DIM, 2).eval()
    merged, others, query = torch.randn(1, 3, DIM), torch.randn(1, 5, DIM), torch.randn(1, 4, DIM)
    repeated = torch.cat([merged, merged, merged, others], dim=1)
    bias = torch.tensor([math.log(3)] * 3 + [0.0] * 5)
    once = block(query, torch.cat([merged, others], dim=1), bias)
    torch.testing.assert_close(once, block(query, repeated), atol=1e-5, rtol=1e-5)


def test_assignment_is_what_the_last_block_draws_from_the_image_tokens() -> None:
    stgm = SemanticTokenGenerator(DIM, (2, 8, 8), (1, 4, 4), STGMArguments())
    blocks = [Block(DIM, 2).eval() for _ in range(2)]
    assignment = stgm(torch.randn(2, 128, DIM), blocks, return_assignment=True).assignment
    assert assignment.shape == (2, 16, 128)
    assert (assignment >= 0).all()
    assert (assignment.sum(dim=2) <= 1).all()
