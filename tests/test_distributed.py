"""Rank variables: a complete set, none, or an error that names what is missing."""

import subprocess
import sys

import pytest

from stvit_video.distributed import TORCHRUN_VARIABLES, join_world, on_main
from stvit_video.errors import UsageError


@pytest.fixture(autouse=True)
def _no_rank_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_variables_one_process_runs_alone() -> None:
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert on_main(world, lambda: 3) == 3


@pytest.mark.parametrize("present", [("RANK",), ("WORLD_SIZE", "RANK"), TORCHRUN_VARIABLES[:-1]])
def test_a_partial_set_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...]) -> None:
    for name in present:
        monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError) as error, join_world("cpu"):
        pass
    for name in TORCHRUN_VARIABLES:
        assert name in str(error.value)


def test_a_group_that_cannot_form_is_an_error_not_a_single_process() -> None:
    code = "from stvit_video.distributed import join_world\nwith join_world('cpu', timeout_s=3) as w: print('ran', w)"
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "ran" not in result.stdout


def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="0 GPUs are visible"), join_world("cuda"):
        pass
