"""What one round measured, and what all of them say together. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from revivemoe.bench.loadgen import StreamResult, gaps

MOST_FOREIGN = 0.1
"""Cores busy with something else, from which on a round is not counted."""


@dataclass(frozen=True)
class Round:
    """Some streams at once through one system. Seconds, tokens per second, MiB."""

    system: str
    streams: int
    tokens_per_s: float
    ttft_s: float
    """Median time to the first token."""
    ttft_worst_s: float
    gap_s: float
    """Median time between tokens of a stream."""
    gap_p99_s: float
    cpu_per_token_s: float
    pss_mb: float
    foreign_cores: float

    @property
    def disturbed(self) -> bool:
        return self.foreign_cores > MOST_FOREIGN


def first_tokens(results: Sequence[StreamResult]) -> list[float]:
    """Seconds from each request to its first token."""
    return [result.times[0] - result.started for result in results]


def of_streams(
    system: str, results: Sequence[StreamResult], cpu_s: float, pss_mb: float, foreign: float
) -> Round:
    """Every stream must have tokens."""
    began, ended = min(r.started for r in results), max(r.times[-1] for r in results)
    tokens = sum(len(r.times) for r in results)
    first, between = first_tokens(results), sorted(gaps(results)) or [0.0]
    return Round(
        system,
        len(results),
        tokens / (ended - began),
        statistics.median(first),
        max(first),
        statistics.median(between),
        between[int(0.99 * (len(between) - 1))],
        cpu_s / tokens,
        pss_mb,
        foreign,
    )


@dataclass(frozen=True)
class Summary:
    """Medians over the rounds of a system at so many streams that nobody disturbed; over all of
    them, and so said, where that would leave none.
    """

    system: str
    streams: int
    counted: int
    rounds: int
    tokens_per_s: float
    least: float
    most: float
    ttft_s: float
    ttft_worst_s: float
    gap_s: float
    gap_p99_s: float
    cpu_per_token_s: float
    pss_mb: float


def summarise(rounds: Sequence[Round]) -> list[Summary]:
    """In the order in which systems and numbers of streams came up."""
    groups: dict[tuple[int, str], list[Round]] = {}
    for each in rounds:
        groups.setdefault((each.streams, each.system), []).append(each)
    return [_summary(group) for _, group in sorted(groups.items(), key=lambda item: item[0][0])]


def _summary(rounds: Sequence[Round]) -> Summary:
    quiet = [each for each in rounds if not each.disturbed]
    counted = quiet or rounds
    rates = [each.tokens_per_s for each in counted]

    def median(name: str) -> float:
        return statistics.median(getattr(each, name) for each in counted)

    return Summary(
        rounds[0].system,
        rounds[0].streams,
        len(quiet),
        len(rounds),
        statistics.median(rates),
        min(rates),
        max(rates),
        median("ttft_s"),
        median("ttft_worst_s"),
        median("gap_s"),
        median("gap_p99_s"),
        median("cpu_per_token_s"),
        median("pss_mb"),
    )
