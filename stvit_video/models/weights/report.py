"""The report on every key of a checkpoint, and the refusal of files that are of another network, or parts of one."""

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from stvit_video.common.errors import UsageError
from stvit_video.models.weights.files import StateDict
from stvit_video.models.zoo import FAMILIES

STATUSES = ("loaded", "inflated", "interpolated", "new", "unused", "wrong shape")
MIN_COVERAGE = 0.5  # whoever asks for less takes parts of networks too
# Parts that a model may have beyond the network of its checkpoint; a file that has some of a kind must have them all.
ADDED = re.compile(r"(time_embed|global_centres|pooling\.mask_|pooling\.offset_|gamma_[12]$|^reducer\.|^head\.)")


@dataclass
class LoadReport:
    """The status of every key: ``keys[status]`` lists names; ``coverage`` is the share of the model's weights loaded.

    "unused" are keys of the source, under its own names if they were dropped in conversion; others are the model's.
    ``differences`` are those of ``notes`` that make the outputs differ from the source's.
    """

    source: str
    layout: str
    keys: dict[str, list[str]] = field(default_factory=lambda: {status: [] for status in STATUSES})
    weights: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # those of "unused" that no model here has
    coverage: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)  # of the source model, if its file has them

    def summary(self) -> str:
        """Return lines as ``str`` does, but one on all keys."""
        counts = []
        for status, names in self.keys.items():
            shown = f" ({shorten(names, 2)})" if names and status != "loaded" else ""
            counts += [f"{len(names)} {status}{shown}"] if names else []
        return "\n".join(
            [self._headline(), f"  keys: {', '.join(counts)}", *(f"  note: {note}" for note in self.notes)]
        )

    def _headline(self) -> str:
        return f"{self.source}: {self.layout} layout, {100 * self.coverage:.1f} % of the weights covered"

    def __str__(self) -> str:
        lines = [
            self._headline(),
            f"  {'':12} {'keys':>5} {'weights':>12}",
        ]
        for status in STATUSES:
            names = self.keys[status]
            shown = "" if status == "loaded" else shorten(names, 4)
            lines.append(f"  {status:12} {len(names):5} {self.weights[status]:12,}  {shown}".rstrip())
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(line.replace("\n", r"\n") for line in lines)  # names of tensors are the file's

    def to_json(self) -> str:
        """Return all of it as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def add(self, status: str, name: str, weights: int) -> None:
        """Add a key."""
        self.keys[status].append(name)
        self.weights[status] += weights

    def differ(self, why: str) -> None:
        """Note why the outputs differ from the source's."""
        self.notes.append(why)
        self.differences.append(why)


def shorten(names: list[str], count: int) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def check_values(tensors: StateDict, source: str) -> None:
    """Raise UsageError for values that are not finite, and for weights in a quantised form."""
    bad = {}
    for name, value in tensors.items():
        if value.is_floating_point() and not name.endswith("mask"):
            try:
                count = value.numel() - int(torch.isfinite(value.float()).sum())
            except RuntimeError as error:  # of a type that is stored only
                raise UsageError(f"{source}: {name} is {value.dtype}; give weights in floating point.") from error
            if count:
                bad[name] = count
        elif name.endswith("weight") and value.dtype in (torch.int8, torch.uint8):
            raise UsageError(f"{source}: {name} is quantised ({value.dtype}); give weights in floating point.")
    if bad:
        shown = shorten([f"{name} ({count:,} of {tensors[name].numel():,})" for name, count in bad.items()], 4)
        raise UsageError(
            f"{source}: {len(bad)} tensors hold values that are not finite (NaN or infinite): {shown}. Its training "
            f"failed, or the file is damaged; give an earlier checkpoint."
        )


def check_config(config: dict[str, Any], model: nn.Module, source: str) -> None:
    """Raise UsageError where Hugging Face's configuration beside a file says what its tensors do not show."""
    heads = config.get("num_attention_heads")
    own = next(module.num_heads for module in model.modules() if hasattr(module, "num_heads"))
    if isinstance(heads, int) and heads != own:
        raise UsageError(
            f"{source}: its config.json has {heads} attention heads, this model {own}; build it with num_heads={heads}."
        )
    activation = config.get("hidden_act", "gelu")
    if activation not in ("gelu", "gelu_python"):
        raise UsageError(f"{source}: its config.json has the activation {activation!r}; models here have gelu.")
    eps = config.get("layer_norm_eps", 0)
    if not isinstance(eps, int | float) or eps > 2e-5:
        raise UsageError(f"{source}: its config.json has layer_norm_eps {eps}; models here have at most 1e-05.")


@dataclass(frozen=True)
class Build:
    """What tensors tell of a network: its family, the width of its first block, and the blocks of its stages."""

    family: str
    width: int
    depths: tuple[int, ...]

    @classmethod
    def of(cls, state: StateDict) -> "Build | None":
        """Read it from names and shapes; None where these are no ViT or Swin."""
        stages: dict[str, set[str]] = {}
        for name in state:
            if match := re.match(r"(layers\.\d+\.)?blocks\.(\d+)\.", name):
                stages.setdefault(match[1] or "", set()).add(match[2])
        first = state.get(f"{min(stages)}blocks.0.norm1.weight") if stages else None
        if first is None:
            return None
        return cls("vit" if "" in stages else "swin", first.numel(), tuple(len(stages[key]) for key in sorted(stages)))

    def model(self, like: str) -> str:
        """Return the name of the model of this size, of the kind of the model ``like``; empty if there is none."""
        family = max((name for name in FAMILIES if like.startswith(f"{name}_")), key=len, default="")
        if not family.endswith(self.family):
            family = f"stvit_{self.family}" if family.startswith("stvit") else self.family
        for size, settings in FAMILIES[family].sizes.items():
            depths = settings["depths"] if self.family == "swin" else (settings["depth"],)
            if (settings["dim"], depths) == (self.width, self.depths):
                return f"{family}_{size}"
        return ""


def advise(found: Build | None, own: Build | None, model: nn.Module, report: LoadReport) -> str:
    """Return how the network of a file differs in size from the model's own, and what to use; empty if alike."""
    if found is None or own is None or found == own:
        return ""
    sizes: list[tuple[str, Any, Any]] = [("width", found.width, own.width)] if found.width != own.width else []
    if found.family != own.family:
        sizes = [("family", found.family, own.family)]
    elif found.depths != own.depths:
        theirs, ours = ("-".join(map(str, depths)) for depths in (found.depths, own.depths))
        sizes.append(("depth", theirs, ours))
    name = report.arguments.get("name") or found.model(getattr(model, "name", ""))
    depth = f"depth={found.depths[0]}" if found.family == "vit" else f"depths={found.depths}"
    return (
        ", ".join(f"{what} {theirs}, this model {ours}" for what, theirs, ours in sizes)
        + f": use {name or f'create_model(..., dim={found.width}, {depth})'}"
    )


def check_report(
    report: LoadReport,
    model: nn.Module,
    given: StateDict,
    wanted: Collection[str],
    min_coverage: float,
    depth: int | None,
) -> None:
    """Raise UsageError where too little of the model is covered, or the file is part of a network or another one.

    ``given`` are the converted tensors of the file, ``wanted`` the keys of the model that it is asked for. A
    ``min_coverage`` below MIN_COVERAGE admits parts.
    """
    keys, source = report.keys, f"{report.source} ({report.layout} layout)"
    states = (given, model.state_dict())
    found, own = map(Build.of, states)
    advice = advise(found, own, model, report)
    if found and own and found.family == own.family:
        if found.width != own.width:
            raise UsageError(f"{source}: {advice}.")
        kernels = [state.get("patch_embed.proj.weight") for state in states]
        theirs, ours = ("" if kernel is None else "x".join(map(str, kernel.shape[-2:])) for kernel in kernels)
        if theirs and theirs != ours:
            raise UsageError(f"{source}: patches of {theirs} pixels, this model {ours}; build it with that patch_size.")
    if report.coverage < min_coverage:
        raise UsageError(
            f"{source}: only {100 * report.coverage:.1f} % of the model's weights "
            f"found, {100 * min_coverage:.0f} % required (MODEL.INIT_MIN_COVERAGE). Not covered: "
            f"{shorten(keys['new'] + keys['wrong shape'], 20)}. Unused: {shorten(keys['unused'], 10) or 'none'}. "
            f"Check that the file belongs to this architecture{f' ({advice})' if advice else ''}."
        )
    heads = [name for name in keys["wrong shape"] if name.startswith("head.")]
    if heads:
        raise UsageError(
            f"{report.source}: its classifier ({', '.join(heads)}) has another class count than the model. "
            f"Set MODEL.NEW_HEAD True (new_head=True) to train a new one, or build the model with its class count."
        )
    if min_coverage >= MIN_COVERAGE:
        _check_whole(report, given, wanted, depth, advice)


def _check_whole(report: LoadReport, given: StateDict, wanted: Collection[str], depth: int | None, advice: str) -> None:
    """Raise UsageError for a part of a network, or a network whose blocks compute something else."""
    keys, source = report.keys, f"{report.source} ({report.layout} layout)"
    remedy = (
        f"To start from a part, set MODEL.INIT_DEPTH to its last whole block, or MODEL.INIT_MIN_COVERAGE below "
        f"{MIN_COVERAGE} (depth, min_coverage)."
    )
    kinds = {match[1] for match in map(ADDED.search, given) if match}
    absent = keys["new"] + keys["wrong shape"]
    lacking = [
        name for name in absent if name in wanted and not ((kind := ADDED.search(name)) and kind[1] not in kinds)
    ]
    if report.layout == "Hugging Face VideoMAE" and not any(name.startswith(("norm.", "head.")) for name in given):
        # An encoder saved alone ends before the norm.
        lacking = [name for name in lacking if not name.startswith("norm.")]
    if lacking:
        positions = "pos_embed" in lacking and "pos_embed" not in given
        what = " It has no table of positions, as networks with rotary or relative ones." if positions else ""
        raise UsageError(
            f"{source} lacks {len(lacking)} tensors that this model and its layout have, or has them in another shape: "
            f"{shorten(lacking, 8)}.{what} It is cut short, one of several shards, or of another network"
            f"{f' ({advice})' if advice else ''}: give the whole file. {remedy}"
        )
    strange = [name for name in keys["unused"] if re.match(r"(blocks|layers)\.(?!\d+\.generators)", name)]
    strange = [name for name in strange if not name.endswith("relative_position_bias_table")]
    strange = [name for name in strange if name not in report.dropped]
    if strange and depth is None:
        raise UsageError(
            f"{source} has {len(strange)} tensors in its blocks that this model has not: {shorten(strange, 4)}. It is "
            f"of another network{f' ({advice})' if advice else ''}. {remedy}"
        )
