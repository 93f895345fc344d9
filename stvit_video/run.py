"""Train and test video transformers: ``python -m stvit_video.run --cfg FILE [KEY VALUE ...]``.

Exit codes: 0 done; 2 wrong use or configuration, said in one line on stderr; 75 stopped by a signal, with a checkpoint
of the last step; 1 failure, or Ctrl-C where nothing is under way that could be continued so.
"""

import sys
from collections.abc import Sequence
from functools import partial

from stvit_video.common.cli import Parser, run_command


def dispatch(arguments: Sequence[str] | None) -> int:
    """Parse, load the configuration, open the run on all its processes, and do what MODE names."""
    from stvit_video.config import load_config
    from stvit_video.config.schema import BY_NAME, describe_keys

    parser = Parser(__doc__, BY_NAME)
    parser.add_argument(
        "--cfg", action="append", metavar="FILE", help="configuration, for example configs/sample_stvit.yaml"
    )
    parser.add_argument("--keys", action="store_true", help="list every configuration key with its default and exit")
    parser.add_argument("--cost", action="store_true", help="print the model's GFLOPs and memory, and exit")
    parser.add_argument("--dry-run", action="store_true", help="build all, run one batch, begin no run, and exit")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="or KEY=VALUE; last one wins")
    options = parser.parse_intermixed_args(arguments)
    if options.keys:
        print(describe_keys())
        return 0
    if options.cfg is None:
        file = next((f"; write --cfg {word}" for word in options.overrides if word.endswith((".yaml", ".yml"))), "")
        parser.error(f"--cfg FILE is missing{file}")
    if len(options.cfg) > 1:
        parser.error(f"--cfg is given {len(options.cfg)} times ({', '.join(options.cfg)}); give one file")
    cfg = load_config(options.cfg[0], options.overrides)

    if options.cost:
        from stvit_video.runs.preflight import build_cost_report

        print(build_cost_report(cfg), flush=True)
        return 0
    # Imported late: a wrong option is answered at once, and processes that only generate data stay light.
    from stvit_video.evaluation.evaluate import test
    from stvit_video.runs.preflight import open_run
    from stvit_video.runtime.world import join_world
    from stvit_video.training.loop import build_dry_run, train
    from stvit_video.training.transfer import transfer

    with join_world(cfg.DEVICE, cfg.PARALLEL.TIMEOUT_S) as world:
        run = open_run(cfg, world, "rehearse" if options.dry_run else "run")
        if run is not None:  # else it is finished already
            commands = {"train": train, "test": test, "transfer": transfer}
            (build_dry_run if options.dry_run else commands[cfg.MODE])(run)
    return 0


main = partial(
    run_command,
    dispatch,
    stopped="stopped; the same command, without OVERWRITE, continues from the last checkpoint",
    stopped_code=1,
    again="the same command, without OVERWRITE, continues",
)

if __name__ == "__main__":
    sys.exit(main())
