"""Interleaved rounds of timed alternatives, and the lines that describe them."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Row:
    """One measured step: the milliseconds of each round, per clip or per video, and the share of the first row's."""

    name: str
    milliseconds: list[float]
    ratio: float

    @property
    def median(self) -> float:
        return median(self.milliseconds)


def interleave(timers: "dict[str, Timer]", rounds: int) -> list[Row]:
    """Run each timer once a round, after a round that is not counted; ratios are to the first one's median."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 1):
        for name, timer in timers.items():
            taken = timer()
            if number:
                seconds[name].append(1000 * taken)
    reference = median(next(iter(seconds.values())))
    return [Row(name, taken, median(taken) / reference) for name, taken in seconds.items()]


def describe(title: str, item: str, rows: list[Row]) -> str:
    """Return a table of medians and spreads."""
    width = max(len(row.name) for row in rows)
    lines = [f"{title}\n{'':{width}}  {'ms a ' + item:>11}  {'least to most':>17}  {item + 's/s':>9}  {'ratio':>5}"]
    for row in rows:
        spread = f"{min(row.milliseconds):.1f} to {max(row.milliseconds):.1f}"
        rate = 1000 / row.median
        lines.append(f"{row.name:{width}}  {row.median:11.1f}  {spread:>17}  {rate:9.1f}  {row.ratio:5.2f}")
    return "\n".join(lines)


Timer = Callable[[], float]  # runs one round and returns seconds per item
