"""Streams: decisions over a moving window of a video, of which every frame is computed once.

In the streaming form of the ViT the semantic tokens of a group of frames depend on these frames alone. A stream keeps
those of the last window. For each new group it computes the group's tokens and the few blocks on the window's tokens.

Legend: B videos, n new frames, G groups of a window, m semantic tokens of a group, M = G*m, C channels, d decisions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stvit_video.models.layers import Intermediates


class TokenStream:
    """The semantic tokens of the last window of each of ``batch_size`` videos, and the decisions on them.

    A decision is due every ``group`` frames and equals the model's logits of the window of ``num_frames`` frames that
    ends there, up to the rounding of other shapes: bit for bit where a push is one whole window. The model has to be in
    evaluation mode; a stream starts anew (``reset``) where its weights change. Memory depends on the frames of a push,
    and not on how many there were before.
    """

    group: int  # frames from one decision to the next
    ready: Tensor  # (B, d): which decisions of the last push are on a whole window; the logits of others are NaN

    def __init__(self, model: Any, batch_size: int = 1) -> None:
        """Start empty streams; ``model`` is a VisionTransformer of the streaming form."""
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}; a stream takes 1 video or more.")
        self.batch_size, self._model = batch_size, model
        groups, reducer = model.regions[0], model.token_reducer
        self.group = model.input_size[0] // groups
        weight = model.pos_embed
        self._tokens = weight.new_zeros(batch_size, groups, reducer.count, weight.shape[-1])  # oldest first
        self._filled = [0] * batch_size  # groups of the window that were seen since the start or the last reset
        self.ready = torch.zeros(batch_size, 0, dtype=torch.bool)
        self._reduce_frames, self._forward_tokens = model.reduce_frames, self._decide

    @property
    def tokens(self) -> Tensor:
        """The semantic tokens (B, M, C) of the last window, without positions in time; 0 before its start."""
        return self._tokens.flatten(1, 2)

    def compile(self, **options: Any) -> None:
        """Compile both steps as ``torch.compile`` does; a model whose blocks are compiled needs no more."""
        self._reduce_frames = torch.compile(self._model.reduce_frames, **options)
        self._forward_tokens = torch.compile(self._decide, **options)

    @torch.no_grad()
    def push(
        self, frames: Tensor, return_intermediates: bool = False, *, after: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """Take the next frames (B, 3, n, H, W), n a multiple of ``group``; return the logits (B, d, classes).

        The d decisions are those after the last d of the new groups: for all groups once a window is full, for fewer
        or none before. ``after`` lists, in ascending order from 0, the new groups after which a decision is wanted;
        others then cost no deep blocks. ``ready`` says which videos have a whole window there; the logits of others
        are NaN. As intermediates, "embed", "base", "semantic" and the assignment are of the new frames; "final", where
        there are decisions, has their windows one after another: (B, d*M, C).

        Raises ValueError for frames of another shape, or a model in training mode; the stream is then as it was.
        """
        self._check(frames, after)
        B, groups, m, C = self._tokens.shape
        seen = Intermediates() if return_intermediates else None
        new, _ = self._reduce_frames(frames, seen)
        kept = torch.cat([self._tokens.to(new), new.unflatten(1, (-1, m))], dim=1)
        count = kept.shape[1] - groups
        filled = [[min(seen_before + i, groups) for i in range(1, count + 1)] for seen_before in self._filled]
        due = [i for i in (range(count) if after is None else after) if any(row[i] == groups for row in filled)]
        ready = torch.tensor([[row[i] == groups for i in due] for row in filled], dtype=torch.bool, device=new.device)
        if due:
            windows = torch.stack([kept[:, i + 1 : i + 1 + groups] for i in due], dim=1)  # (B, d, G, m, C)
            logits = self._forward_tokens(windows.flatten(2, 3).flatten(0, 1), seen).unflatten(0, (B, len(due)))
            logits = logits.masked_fill(~ready.unsqueeze(-1), torch.nan)
        else:
            logits = new.new_zeros(B, 0, self._model.head.proj.out_features)
        if seen is not None and due:
            t, h, w = seen.grids["final"]
            seen.grids["final"] = (len(due) * t, h, w)
            seen.tensors["final"] = seen.tensors["final"].reshape(B, -1, C)
        # Nothing is kept before all has succeeded. The copy lets go of the tokens of earlier groups.
        self._tokens, self._filled, self.ready = kept[:, -groups:].clone(), [row[-1] for row in filled], ready
        return logits if seen is None else (logits, seen)

    def reset(self, rows: int | Sequence[int] | Tensor | None = None) -> None:
        """Start the videos of these rows of the batch anew, by default all; ``rows`` are indices, or a mask (B,)."""
        given = torch.arange(self.batch_size) if rows is None else torch.as_tensor(rows).reshape(-1)
        chosen: list[int] = (given.nonzero().flatten() if given.dtype == torch.bool else given).tolist()
        if wrong := [row for row in chosen if not 0 <= row < self.batch_size]:
            raise ValueError(f"row {wrong[0]} of a stream of {self.batch_size}; allowed: 0 to {self.batch_size - 1}.")
        mask = torch.zeros(self.batch_size, dtype=torch.bool)
        mask[chosen] = True
        self._tokens = self._tokens.masked_fill(mask.to(self._tokens.device)[:, None, None, None], 0)
        self._filled = [0 if row in chosen else count for row, count in enumerate(self._filled)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a stream of the same model and batch size needs to go on from here."""
        weights = torch.stack([torch.hash_tensor(parameter.detach()) for parameter in self._model.parameters()])
        return {"tokens": self.tokens, "filled": torch.tensor(self._filled), "weights": weights.view(torch.int64).cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state_dict``. Raises ValueError for one of another model, other weights or batch size."""
        own = self.state_dict()
        if state.keys() != own.keys() or any(state[key].shape != own[key].shape for key in own):
            given, allowed = ({key: tuple(value.shape) for key, value in each.items()} for each in (state, own))
            raise ValueError(
                f"state of a stream with {given}; this one takes {allowed}: that of the same model and batch."
            )
        if not torch.equal(state["weights"].cpu(), own["weights"]):
            raise ValueError("state of a stream of other weights; load those with which it was saved, or start anew.")
        groups = self._tokens.shape[1]
        filled = [int(count) for count in state["filled"]]
        if not all(0 <= count <= groups for count in filled):
            raise ValueError(
                f"state of a stream with filled {filled}; this one takes 0 to {groups} groups of a window."
            )
        self._tokens, self._filled = state["tokens"].detach().reshape(self._tokens.shape).clone(), filled

    def _decide(self, windows: Tensor, intermediates: Intermediates | None) -> Tensor:
        """Map the tokens (B*d, M, C) of windows to logits (B*d, classes)."""
        logits: Tensor = self._model.head(self._model.forward_tokens(windows, None, intermediates))
        return logits

    def _check(self, frames: Tensor, after: Sequence[int] | None) -> None:
        sides = self._model.input_size[1:]
        B, channels, n, *given = frames.shape if frames.ndim == 5 else (0, 0, 0)
        if (B, channels, *given) != (self.batch_size, 3, *sides) or n < 1 or n % self.group:
            raise ValueError(
                f"frames of shape {tuple(frames.shape)}; this stream takes ({self.batch_size}, 3, n, {sides[0]}, "
                f"{sides[1]}), n a multiple of its group of {self.group} frames. Resize frames, and keep those of a "
                f"group that is not complete for the next push."
            )
        if after is not None and list(after) != sorted({i for i in after if 0 <= i < n // self.group}):
            raise ValueError(
                f"after={list(after)}; these frames are {n // self.group} groups: give numbers from 0 to "
                f"{n // self.group - 1}, each once and in ascending order."
            )
        if self._model.training:
            raise ValueError("the model is in training mode, in which a stream is not its windows; call model.eval().")
