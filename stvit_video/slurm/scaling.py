"""What 1, 8, 64 and 512 GPUs mean for a run: ``python -m stvit_video.slurm.scaling --cfg FILE``. A calculation.

It measures nothing: the network's cost is counted, the other numbers are the options, which you measure once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from stvit_video.common.cli import Parser
from stvit_video.common.errors import UsageError

GPUS = (1, 8, 64, 512)
BACKWARD = 2 / 3  # its share of a step's computation, behind which gradients travel


@dataclass(frozen=True)
class Costs:
    """Of one network and one machine."""

    parameters: int
    forward_gflops: float  # of a clip, a multiplication with its addition counted as one
    gpu_tflops: float  # what a GPU sustains
    core_clips: float  # clips a CPU core prepares in a second
    network_gb: float  # bytes a GPU sends and receives in a second, in 1e9

    @property
    def gpu_clips(self) -> float:
        """Clips a GPU trains on in a second: forward, and twice that backward, two operations each."""
        return self.gpu_tflops * 1000 / (self.forward_gflops * 3 * 2)


@dataclass(frozen=True)
class Row:
    """One number of GPUs."""

    gpus: int
    batch: int
    lr: float
    steps: int
    ddp_gb: float  # sent by each GPU a step
    fsdp_gb: float
    efficiency: float
    hours: float
    cores: float  # CPU cores that decode, for each GPU


def scale(costs: Costs, gpus: int, clips_a_gpu: int, lr: float, base_batch: int, videos: int, epochs: int) -> Row:
    """Return what ``gpus`` GPUs do with a batch of ``clips_a_gpu`` each.

    Gradients and weights are 4 bytes. A ring all-reduce sends 2 (N - 1) / N of the gradients; sharding (FSDP) gathers
    the weights forward and backward and scatters the gradients, 3 (N - 1) / N. The rate follows the batch linearly.
    """
    batch = clips_a_gpu * gpus
    size, share = 4e-9 * costs.parameters, (gpus - 1) / gpus
    compute = clips_a_gpu / costs.gpu_clips
    waiting = max(0.0, 2 * share * size / costs.network_gb - BACKWARD * compute)
    steps = epochs * (videos // batch)
    return Row(
        gpus=gpus,
        batch=batch,
        lr=lr * batch / base_batch,
        steps=steps,
        ddp_gb=2 * share * size,
        fsdp_gb=3 * share * size,
        efficiency=compute / (compute + waiting),
        hours=steps * (compute + waiting) / 3600,
        cores=costs.gpu_clips / costs.core_clips,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = Parser(
        prog="python -m stvit_video.slurm.scaling",
        form="--cfg FILE [options]",
        description="Calculate how a run scales.",
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="configuration of the run")
    parser.add_argument("--videos", type=int, default=240_000, help="of the training list (default: Kinetics-400)")
    parser.add_argument("--clips-a-gpu", type=int, default=8, help="batch of each GPU (default: %(default)s)")
    parser.add_argument("--gpu-tflops", type=float, default=100, help="that it sustains (assumed: %(default)s)")
    parser.add_argument(
        "--core-clips", type=float, default=10, help="clips/s a CPU core decodes (default: %(default)s)"
    )
    parser.add_argument("--network-gb", type=float, default=20, help="GB/s of a GPU's network (assumed: %(default)s)")
    try:
        options = parser.parse_args(arguments)
        for name in ("videos", "clips_a_gpu", "gpu_tflops", "core_clips", "network_gb"):
            if getattr(options, name) <= 0:
                parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} has to be above 0")
        print(calculate(options.cfg, options))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def calculate(path: str, options: object) -> str:
    """Return the table for the configuration at ``path``."""
    from stvit_video.config.load import load_config
    from stvit_video.models.cost import count_gflops, count_parameters
    from stvit_video.models.zoo import build_model
    from stvit_video.runs.preflight import KINETICS_CLASSES

    given, cfg = vars(options), load_config(path)
    model = build_model(cfg, cfg.MODEL.NUM_CLASSES or KINETICS_CLASSES)
    gflops = count_gflops(model, (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))
    costs = Costs(count_parameters(model), gflops, given["gpu_tflops"], given["core_clips"], given["network_gb"])
    lines = [
        f"{cfg.MODEL.NAME}: {costs.parameters / 1e6:.1f} M parameters, {gflops:.1f} GFLOPs a clip forward",
        f"a GPU of {costs.gpu_tflops:g} TFLOP/s trains on {costs.gpu_clips:.0f} clips/s, and needs "
        f"{costs.gpu_clips / costs.core_clips:.0f} cores that decode {costs.core_clips:g} clips/s each",
        "",
        "| GPUs | batch | learning rate | steps | GB a step, DDP | FSDP | efficiency (%) | hours | decode cores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        row = scale(
            costs, gpus, given["clips_a_gpu"], cfg.OPTIM.LR, cfg.TRAIN.BATCH_SIZE, given["videos"], cfg.TRAIN.EPOCHS
        )
        lines.append(
            f"| {row.gpus} | {row.batch} | {row.lr:.2g} | {row.steps} | {row.ddp_gb:.3f} | {row.fsdp_gb:.3f} "
            f"| {100 * row.efficiency:.0f} | {row.hours:.1f} | {row.cores * row.gpus:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
