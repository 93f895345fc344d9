"""What 1, 8, 64 and 512 GPUs mean for a run: ``python -m stvit_video.slurm.scaling --cfg FILE [options]``.

A calculation from the model's parameters and FLOPs; the speeds of the machine are options. Nothing is measured.
"""

import sys
from collections.abc import Sequence
from functools import partial

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.tables import format_table, three_digits

GPUS = (1, 8, 64, 512)
COLUMNS = {
    "GPUs": "d",
    "batch": "d",
    "learning rate": ".2g",
    "steps": "d",
    "GB a step, DDP": ".3f",  # sent by each GPU
    "FSDP": ".3f",
    "efficiency (%)": ".0f",
    "hours": ".1f",
    "decode cores": ".0f",  # of all machines
}
BACKWARD = 2 / 3  # share of a step's computation, during which gradients are exchanged


def gpu_speed(forward_gflops: float, gpu_tflops: float) -> float:
    """Return the clips per second that a GPU trains on, given a clip's GFLOPs (a multiply-add counts as one)."""
    return gpu_tflops * 1000 / (forward_gflops * 3 * 2)  # the backward pass costs twice the forward pass


def scale(
    gpus: int,
    parameters: int,
    gpu_clips: float,
    core_clips: float,
    network_gb: float,
    clips_a_gpu: int,
    lr: float,
    base_batch: int,
    videos: int,
    epochs: int,
) -> dict[str, float]:
    """Return the row of COLUMNS for ``gpus``, where ``lr`` belongs to a batch of ``base_batch`` and scales linearly.

    A GPU trains on ``gpu_clips`` per second, a CPU core decodes ``core_clips`` per second, and the network of each GPU
    sends and receives ``network_gb`` (1e9 bytes) per second. Gradients and weights are 4 bytes. A ring all-reduce sends
    2 (N - 1) / N of the gradients; sharding (FSDP) gathers the weights twice and scatters the gradients, 3 (N - 1) / N.
    """
    batch = clips_a_gpu * gpus
    sent = 4e-9 * parameters * (gpus - 1) / gpus
    compute = clips_a_gpu / gpu_clips
    waiting = max(0.0, 2 * sent / network_gb - BACKWARD * compute)
    steps = epochs * (videos // batch)
    efficiency, hours = compute / (compute + waiting), steps * (compute + waiting) / 3600
    cores = gpus * gpu_clips / core_clips
    values = (gpus, batch, lr * batch / base_batch, steps, 2 * sent, 3 * sent, 100 * efficiency, hours, cores)
    return dict(zip(COLUMNS, values, strict=True))


def calculate(arguments: Sequence[str] | None) -> int:
    """Parse the options and print the table."""
    parser = Parser(__doc__)
    parser.add_argument("--cfg", required=True, dest="path", metavar="FILE", help="configuration of the run")
    numbers = {
        "--videos": (number(int, 1), 240_000, "of the training list (default: Kinetics-400)"),
        "--clips-a-gpu": (number(int, 1), 8, "batch of each GPU (default: %(default)s)"),
        "--gpu-tflops": (number(float, 0.001), 100, "that it sustains (assumed: %(default)s)"),
        "--core-clips": (number(float, 0.001), 10, "clips/s a CPU core decodes (default: %(default)s)"),
        "--network-gb": (number(float, 0.001), 20, "GB/s of a GPU's network (assumed: %(default)s)"),
    }
    for option, (kind, default, text) in numbers.items():
        parser.add_argument(option, type=kind, default=default, help=text)
    given = vars(parser.parse_args(arguments))
    path = given.pop("path")
    from stvit_video.config.load import load_config
    from stvit_video.models.cost import count_gflops, count_parameters
    from stvit_video.models.zoo import build_model
    from stvit_video.runs.lists import KINETICS_CLASSES

    cfg = load_config(path)
    model = build_model(cfg, cfg.MODEL.NUM_CLASSES or KINETICS_CLASSES)
    gflops = count_gflops(model, (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))
    parameters = count_parameters(model)
    tflops = given.pop("gpu_tflops")
    speed = gpu_speed(gflops, tflops)
    core = given["core_clips"]
    run = {"lr": cfg.OPTIM.LR, "base_batch": cfg.TRAIN.BATCH_SIZE, "epochs": cfg.TRAIN.EPOCHS, **given}
    table = [scale(gpus, parameters, speed, **run) for gpus in GPUS]
    print(
        f"{cfg.MODEL.NAME}: {parameters / 1e6:.1f} M parameters, {three_digits(gflops)} GFLOPs a clip forward\n"
        f"a GPU of {tflops:g} TFLOP/s trains on {speed:.0f} clips/s, and needs "
        f"{speed / core:.0f} cores that decode {core:g} clips/s each\n"
    )
    rows = [[format(value, COLUMNS[name]) for name, value in row.items()] for row in table]
    print(format_table(list(COLUMNS), rows, style="github"))
    return 0


main = partial(run_command, calculate)

if __name__ == "__main__":
    sys.exit(main())
