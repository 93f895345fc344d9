"""Every configuration key once: its default, unit and advice, and the values it takes."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.tables import format_table
from stvit_video.models.arguments import CONFIGURED


@dataclass(frozen=True)
class Key:
    """One configuration key; a default of None means "not set".

    ``kind`` is the type of the value, or of a list's elements, where the default does not show it.
    """

    name: str
    default: Any
    about: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    kind: type | None = None
    length: int | None = None
    before: Any = None  # what a recorded configuration without the key stands for: what the code did before it

    @property
    def is_list(self) -> bool:
        return self.length is not None or isinstance(self.default, list)

    @property
    def type(self) -> type:
        return self.kind or type(self.default[0] if self.is_list else self.default)

    def read(self, value: Any, origin: str) -> Any:
        """Return ``value`` in the key's type: an integer serves as a float, a number as a string, nothing else.

        Raises UsageError, with what is allowed, for a value that the key does not take.
        """
        if value in (None, "None") and self.default is None:  # YAML's null is Python's None to those who type it
            return None
        several = isinstance(value, tuple | list)
        values = [_convert(one, self.type) for one in (value if several else [value])]
        if several != self.is_list or any(type(one) is not self.type for one in values):
            article = "an" if self.type is int else "a"
            takes = f"{self.type.__name__} values" if self.is_list else f"{article} {self.type.__name__}"
            some = self.default or (["a", "b"] if self.type is str else [1, 2, 2][: self.length])
            example = f"'{some}', as one word" if self.is_list else f"{self.default!r}"
            raise UsageError(
                f"{self.name} in {origin} is {value!r:.80} ({type(value).__name__}); it takes {takes} ({self.about}), "
                f"for example {example}."
            )
        if self.length is not None and len(values) != self.length:
            raise UsageError(f"{self.name} has {len(values)} values; it takes {self.length} ({self.about}).")
        for one in values:
            if self.choices and one not in self.choices:
                allowed = ", ".join(choice or "''" for choice in self.choices)
                raise UsageError(f"{self.name} is {one!r:.80}; allowed: {allowed}.{nearest(one, self.choices)}")
            low = -math.inf if self.low is None else self.low
            high = math.inf if self.high is None else self.high
            if isinstance(one, int | float) and not (low <= one <= high and abs(one) < math.inf):
                bounds = f"at least {low}" if self.high is None else f"{low} to {high}"
                raise UsageError(f"{self.name} is {one}; allowed: {bounds} ({self.about}).")
        return values if several else values[0]


def _convert(value: Any, kind: type) -> Any:
    """Return a single value as ``kind`` where it may serve as that, else unchanged."""
    if kind is str and (value is None or type(value) in (int, float)):
        return "" if value is None else str(value)  # a folder or list may be named by digits
    if kind is float and type(value) in (int, str):
        with contextlib.suppress(ValueError, OverflowError):  # YAML reads 1e-3, without a point, as a string
            return float(value)
    return value


MODEL_KEYS = [  # declared in ``stvit_video.models.arguments``
    Key(
        f"MODEL.{name.upper()}",
        rule.default if rule.key == "default" else None,
        *(rule.about, rule.choices, rule.low, rule.high, rule.kind),
        length=None if rule.lengths == (1,) else rule.lengths[0],
    )
    for name, rule in CONFIGURED.items()
]
KEYS = (
    Key("MODE", "train", "train (then test), test, or transfer", ("train", "test", "transfer")),
    Key("OUTPUT_DIR", "", "folder of this run; empty: runs/<name of the configuration file>"),
    Key("OVERWRITE", False, "replace the results, and for MODE train the checkpoints, that OUTPUT_DIR already holds"),
    Key("SEED", 0, "fixes initial weights, sample order and augmentation", low=0),
    Key("DEVICE", "auto", "auto takes a GPU where there is one", ("auto", "cpu", "cuda")),
    Key("PRECISION", "fp32", "bf16, fp16: autocast of fp32 weights; tf32: GPU", ("fp32", "tf32", "bf16", "fp16")),
    Key("COMPILE", "none", "torch.compile: each block, the whole model, or nothing", ("none", "blocks", "model")),
    # --- model
    Key("MODEL.NAME", "stvit_vit_small_patch16", "see stvit_video.models.list_models(); auto: that of MODEL.INIT"),
    Key("MODEL.INIT", "", "checkpoint to start from (.pth or .safetensors); in MODE test the weights to test"),
    Key(
        "MODEL.INIT_MIN_COVERAGE",
        0.5,
        "least share of the weights that MODEL.INIT must cover; below 0.5 parts of a network are taken too",
        low=0,
        high=1,
    ),
    Key(
        "MODEL.INIT_ANTIALIAS",
        True,
        "positions of another size: resampled as timm does; False: as Hugging Face",
        before=True,
    ),
    Key("MODEL.INIT_DEPTH", None, "take blocks up to this one only; deeper ones start anew", kind=int, low=0),
    Key("MODEL.INIT_MOTION", 0.0, "random differences between frames in kernels inflated from an image", low=0),
    Key("MODEL.NEW_HEAD", False, "train a new classifier in place of the one in MODEL.INIT"),
    Key("MODEL.NUM_CLASSES", None, "not set: from DATA.CLASSES, else from the training list", kind=int, low=1),
    *MODEL_KEYS,
    Key("MODEL.GRAD_CHECKPOINTING", False, "recompute activations: less memory, about a third more time"),
    # --- data
    Key("DATA.ROOT", "", "folder that the paths in the lists start from"),
    Key("DATA.TRAIN_LIST", "train.csv", "lines `path label`, class folders, a published CSV or JSON; from DATA.ROOT"),
    Key("DATA.VAL_LIST", "val.csv", "same, scored while training; empty: no validation"),
    Key("DATA.TEST_LIST", "test.csv", "same, for the final multi-view test"),
    Key("DATA.SPLIT", None, "train, val, test percent where one list is all", kind=int, length=3, low=0, high=100),
    Key(
        "DATA.GROUP",
        "auto",
        "keeps cuts of one recording together in DATA.SPLIT: a regular expression on paths whose first group names "
        "the recording; auto: names as in UCF, HMDB and Kinetics; empty: none",
        before="",
    ),
    Key("DATA.CLASSES", "", "file: one class name a line in the order of the labels, or `id name`, CSV or JSON"),
    Key("DATA.MULTI_LABEL", None, "several labels a video: sigmoid, mAP; not set: as the list says", kind=bool),
    Key(
        "DATA.COLUMNS",
        "",
        "of lines with more numbers than the label, as in 'path start_frame stop_frame label'",
        before="",
    ),
    Key("DATA.LABEL", "", "column of the labels in a CSV that has several, as noun_class in EPIC-Kitchens", before=""),
    Key("DATA.FRAME_PATTERN", "", "names of frames where other pictures lie beside: img_{:05}.jpg or img_*", before=""),
    Key("DATA.GENERATE", "", "write this generated set to DATA.ROOT first", ("", "sample", "sample_hard")),
    Key("DATA.GENERATE_CLIPS", [3072, 256, 512], "training, validation and test videos to generate", length=3, low=8),
    Key("DATA.FRAMES", 16, "frames of a clip", low=1),
    Key(
        "DATA.SAMPLING",
        "dense",
        "dense: every DATA.STRIDE-th frame; uniform: one frame out of each of DATA.FRAMES segments; "
        "seconds: frames spread over DATA.CLIP_SECONDS, by PyTorchVideo's clip samplers",
        ("dense", "uniform", "seconds"),
    ),
    Key(
        "DATA.SHORT_VIDEOS",
        "repeat",
        "where most training videos are shorter than a clip: repeat frames, or take DATA.SAMPLING uniform",
        ("repeat", "uniform"),
    ),
    Key("DATA.CLIP_SECONDS", 2.0, "length of a clip; of DATA.SAMPLING seconds only", low=0.001),
    Key("DATA.STRIDE", 4, "video frames from one clip frame to the next; of DATA.SAMPLING dense only", low=1),
    Key("DATA.FPS", None, "stride counts frames at this rate; not set: the file's own", kind=float, low=0.001),
    Key("DATA.SIZE", 224, "height and width of the clip in pixels", low=1),
    Key("DATA.CROP", "short_side", "training crop", ("short_side", "random_resized")),
    Key("DATA.SHORT_SIDE", [256, 320], "range of the random short side in pixels (short_side)", length=2, low=1),
    Key("DATA.CROP_AREA", [0.08, 1.0], "range of crop area over frame (random_resized)", length=2, low=0, high=1),
    Key("DATA.CROP_RATIO", [0.75, 1.3333], "range of its width over height (random_resized)", length=2, low=0.01),
    Key("DATA.FLIP", True, "mirror half of the training clips; False where left and right are classes"),
    Key("DATA.RAND_AUGMENT_LAYERS", 0, "operations of RandAugment on a training clip; 2 is usual, 0: none", low=0),
    Key("DATA.RAND_AUGMENT_MAGNITUDE", 9, "their strength as in torchvision; timm's m9 is 27 here", low=0, high=30),
    Key("DATA.COLOR_JITTER", 0.0, "largest change of brightness, contrast, saturation; 0: none", low=0, high=1),
    Key("DATA.ERASE", 0.0, "probability of a rectangle of noise over the clip; 0.25 is usual", low=0, high=1),
    Key("DATA.TRANSFORM_ON", "workers", "where clips are augmented: device spares the workers", ("workers", "device")),
    Key("DATA.MEAN", [0.485, 0.456, 0.406], "mean of red, green, blue in 0 to 1", length=3, low=0, high=1),
    Key("DATA.STD", [0.229, 0.224, 0.225], "standard deviation of the same", length=3, low=0.001),
    Key("DATA.REPEATS", 1, "clips a training video each time it is decoded; TRAIN.BATCH_SIZE counts them all", low=1),
    Key(
        "DATA.DECODER",
        "auto",
        "auto: pyav; the others are exact, or refuse a file",
        ("auto", "pyav", "decord", "torchcodec"),
    ),
    Key("DATA.DEADLINE_S", 60.0, "seconds that a video may take before its decoder is stopped", low=0.1, high=86400),
    Key("DATA.WORKERS", 4, "loader processes per training process, each with its decoder; 0: one decoder only", low=0),
    Key("DATA.MAX_FAILURES", 0.1, "share of unreadable videos above which the run stops", low=0, high=1),
    # --- optimisation
    Key("TRAIN.EPOCHS", 30, "passes over the training list", low=1),
    Key("TRAIN.MAX_STEPS", 0, "optimiser steps after which training ends before TRAIN.EPOCHS; 0: none", low=0),
    Key(
        "TRAIN.BATCH_SIZE",
        64,
        "clips an optimiser step, over all processes; lowered for a shorter list",
        low=1,
    ),
    Key("TRAIN.BALANCED", False, "an epoch draws as many videos of each class, rare ones repeatedly", before=False),
    Key("TRAIN.ACCUMULATE", 1, "batches a process adds up before a step; raise when memory is short", low=1),
    Key("TRAIN.RESUME", "auto", "auto continues from the newest checkpoint; never stops instead", ("auto", "never")),
    Key("TRAIN.MIXUP", 0.0, "alpha of MixUp, clips blended in pairs; 0.8 is usual for a ViT, 0: none", low=0),
    Key("TRAIN.CUTMIX", 0.0, "alpha of CutMix, a box cut from another clip; 1.0 is usual for a ViT, 0: none", low=0),
    Key("TRAIN.MIX_PROBABILITY", 1.0, "share of the batches that are mixed", low=0, high=1),
    Key("TRAIN.MIX_SWITCH", 0.5, "share of CutMix among them where MixUp is used too", low=0, high=1),
    Key("TRAIN.EMA", 0.0, "decay of the average of weights that is tested; 0.9999 is usual, 0: none", low=0, high=1),
    Key("TRAIN.FREEZE", [], "weights not trained, as patterns of names: [patch_embed.*, blocks.0.*]", kind=str),
    Key("TRAIN.MAX_BAD_STEPS", 10, "steps that may be skipped because the loss or a gradient is not finite", low=0),
    Key("TRAIN.VAL_EVERY", 1, "epochs between validations", low=1),
    Key("TRAIN.PATIENCE", 0, "validations without a better accuracy that end the training; 0: none", low=0, before=0),
    Key("OPTIM.LR", 1e-3, "AdamW's peak learning rate at TRAIN.BATCH_SIZE", low=0),
    Key("OPTIM.LR_BATCH", 0, "batch of OPTIM.LR: the rate grows with TRAIN.BATCH_SIZE; 0: taken as it is", low=0),
    Key("OPTIM.LAYER_DECAY", 1.0, "rate of each layer over the one above; 0.75 with good weights", low=0.01, high=1),
    Key("OPTIM.BACKBONE_SCALE", 1.0, "factor on the rate of all but the classifier; 0.1 with good weights", low=0),
    Key("OPTIM.WEIGHT_DECAY", 0.05, "on matrices only; biases, norms and embeddings are left alone", low=0),
    Key("OPTIM.BETAS", [0.9, 0.999], "AdamW's decay rates", length=2, low=0, high=0.9999),
    Key("OPTIM.WARMUP_EPOCHS", 2.5, "linear rise of the learning rate, before the cosine", low=0),
    Key("OPTIM.CLIP_GRAD", 1.0, "largest gradient norm; 0: no clipping", low=0),
    Key("OPTIM.LABEL_SMOOTHING", 0.0, "0.1 is usual on Kinetics", low=0, high=0.99),
    Key(
        "OPTIM.CLASS_WEIGHTS",
        "none",
        "balanced: rare classes weigh more in the loss, by their share of the training list",
        ("none", "balanced"),
        before="none",
    ),
    # --- test and the rest
    Key("TEST.CLIPS", 4, "clips a test video, evenly spaced", low=1),
    Key("TEST.CROPS", 3, "crops a clip along its longer side: 1 (centre) or 3", low=1, high=3),
    Key("TEST.SHORT_SIDE", 224, "short side of the frame that crops are cut from, in pixels", low=1),
    Key(
        "TEST.WEIGHTS",
        "last",
        "saved and tested after training: last (their average where TRAIN.EMA is set), best in validation, or average, "
        "which needs TRAIN.EMA",
        ("last", "best", "average"),
        before="last",
    ),
    Key("TEST.BATCH_SIZE", 2, "videos a test batch; fixes how figures are summed: keep it when comparing", low=1),
    Key("TRANSFER.NEIGHBOURS", 20, "k of the nearest-neighbour score in MODE transfer", low=1),
    Key("TRANSFER.TEMPERATURE", 0.07, "how much nearer neighbours weigh more; smaller is more", low=1e-4),
    Key("TRANSFER.WEIGHT_DECAY", 1e-3, "of the linear probe", low=0),
    Key("TRANSFER.RANDOM_BASELINE", True, "score random weights too, to show what the checkpoint adds"),
    Key("TRANSFER.FINETUNE", False, "train on the training list last, in OUTPUT_DIR/finetune, and add its test"),
    Key("CHECKPOINT.KEEP", 2, "newest checkpoints to keep; at least 2, since the last may be cut short", low=2),
    Key("CHECKPOINT.EVERY_STEPS", 0, "steps between checkpoints (later while one is written); 0: epochs alone", low=0),
    Key("CHECKPOINT.EVERY_MINUTES", 10.0, "the same in minutes: what a crash may cost; 0: none", low=0),
    Key("LOG.WANDB", "", "project of Weights & Biases to log to as well; empty: none"),
    Key("PARALLEL.STRATEGY", "ddp", "ddp: weights on each process; fsdp: sharded, for large models", ("ddp", "fsdp")),
    Key("PARALLEL.TIMEOUT_S", 1800, "seconds a process waits for the others before it gives up", low=1),
)
BY_NAME = {key.name: key for key in KEYS}
SECTIONS = {key.name.rpartition(".")[0] for key in KEYS} - {""}


def describe_keys() -> str:
    """Return a table of all keys: name, default, advice."""
    return format_table(
        ("key", "default", "advice"), [(key.name, repr(key.default), key.about) for key in KEYS], left=3
    )


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one mapping of full names, such as DATA.FRAMES."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        full = f"{prefix}{name}"
        nested = isinstance(value, Mapping) and full not in BY_NAME  # no key takes a mapping: it is refused as a value
        flat |= flatten(value, f"{full}.") if nested and (value or full in SECTIONS) else {full: value}
    return flat


def complete(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration, of full names, with the values that stand for keys which are newer."""
    values = {key.name: key.before for key in KEYS if key.before is not None}
    if recorded.get("MODEL.POSITIONS") == "clip" and recorded.get("MODEL.FC_NORM"):
        values["MODEL.NORM_EPS"] = 1e-6  # not set, it now follows the classifier of Hugging Face's VideoMAE
    return {**values, **recorded}
