"""What one seed stands for: the instance, its requests, its faults. A pure function of the seed."""

from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from revivemoe.config import EngineConfig
from revivemoe.core.limits import RankLimits
from revivemoe.ids import RankId
from revivemoe.recovery.policy import REPAIRS, Policy
from revivemoe.sampling_params import SamplingParams
from revivemoe.sim.answers import EOS, POISON, VOCABULARY, answers
from revivemoe.sim.faults import (
    KINDS,
    POISONS,
    AtPoint,
    AtTime,
    FaultKind,
    FaultSpec,
    InStage,
    When,
)
from revivemoe.streams import StopStrings, Submission

NUM_EXPERTS = 16
MAX_MODEL_LEN = 64
STEPS = 40
"""About so many steps a seed takes; faults at a step are drawn below."""
STAGES = (
    "fencing", "fencing", "resuming", "resuming", "first step", "restarting", "reloading",
    "boundary", "draining", "loading", "switching", "switching",
)  # fmt: skip
OPENERS = (
    "kill", "kill-two", "kill-all", "error", "stop", "hang", "link", "nan", "launch-slow", "drain",
    "retry", "pause", "switch", "exit-late", "launch-late", "load-endless", "deaf",
)  # fmt: skip
"""Faults that bring about a change of epoch soon, for others to strike in."""
POINTS = (
    (-1, "schedule"), (0, "attention"), (0, "dispatch"), (0, "experts"), (0, "combine"),
    (1, "attention"), (1, "dispatch"), (1, "experts"), (1, "combine"),
    (-1, "sample"), (-1, "commit"),
)  # fmt: skip


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, and when its client leaves, if it does."""

    at_s: float
    submission: Submission
    abort_after_s: float | None = None


@dataclass(frozen=True)
class Scenario:
    """Everything that is drawn beforehand."""

    seed: int
    num_ranks: int
    expert_ranks: int
    """Of these; 0: collocated."""
    dense_ffn_tp: int
    redundant: int
    spare: int
    limits: RankLimits
    policy: Policy
    eager_errors: bool
    max_delay_s: float
    """Of a message between engine and rank."""
    arrivals: tuple[Arrival, ...]
    faults: tuple[FaultSpec, ...]

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(
            model_dir=Path("sim"),
            data_parallel_size=self.num_ranks - self.expert_ranks,
            expert_ranks=self.expert_ranks,
            dense_ffn_tp=self.dense_ffn_tp,
            redundant_experts=self.redundant,
            spare_expert_slots=self.spare,
            device="cpu",
            max_model_len=MAX_MODEL_LEN,
            block_size=self.limits.block_size,
            policy=self.policy,
        )

    def limits_of(self, rank: RankId) -> RankLimits:
        """Expert ranks of the start have no blocks."""
        if rank in self.config.topology().attention:
            return self.limits
        return replace(self.limits, num_blocks=0)


def draw(seed: int, kinds: tuple[FaultKind, ...] = KINDS) -> Scenario:
    """The scenario of a seed, with faults of these kinds."""
    rng = Random(seed)
    num_ranks = rng.choice((4, 4, 4, 5, 6))
    expert_ranks = rng.choice((0, 0, rng.randint(1, num_ranks - 2)))
    if _about_roles(kinds):
        expert_ranks = rng.randint(2, num_ranks - 2)
    count = rng.choice((1, 2, 2, 3))
    faults = tuple(_fault(rng, kinds, num_ranks, n) for n in range(count))
    return Scenario(
        seed=seed,
        num_ranks=num_ranks,
        expert_ranks=expert_ranks,
        dense_ffn_tp=rng.choice((1, 1, 2)),
        redundant=0 if expert_ranks == 1 else rng.choice((NUM_EXPERTS, NUM_EXPERTS, 4, 2, 0)),
        spare=rng.randint(0, 2),
        limits=_limits(rng),
        policy=_policy(rng, masks_more=expert_ranks > 0),
        eager_errors=rng.random() < 0.4,
        max_delay_s=rng.choice((0.0005, 0.002, 0.02)),
        arrivals=tuple(_arrivals(rng, any(f.kind in POISONS for f in faults))),
        faults=faults,
    )


def _about_roles(kinds: tuple[FaultKind, ...]) -> bool:
    """Whether role switches are what is asked for, rather than one kind among all."""
    return "switch" in kinds and len(kinds) < len(KINDS)


def _policy(rng: Random, masks_more: bool) -> Policy:
    """Shorter deadlines than usual, so that a seed that meets one does not take for ever.

    `masks_more`: often enough for role switches in the background.
    """
    return Policy(
        max_recoveries=6,
        max_missing_fraction=rng.choice((1 / 32, 1 / 8, 1 / 2, 0.9 if masks_more else 1 / 2)),
        serve_masked_meanwhile=rng.random() < (0.6 if masks_more else 0.3),
        repair=rng.choice(
            (
                REPAIRS,
                REPAIRS,
                ("role_switch", "restart"),
                ("mask", "reload", "restart"),
                ("reload", "mask"),
            )
        ),
        fence_timeout_s=5.0,
        resume_timeout_s=10.0,
        reload_timeout_s=10.0,
        restart_timeout_s=8.0,
        drain_timeout_s=3.0,
        first_work_s=5.0,
        slow_after_s=0.3,
        spawn_timeout_s=2.0,
        join_timeout_s=10.0,
        leave_timeout_s=1.5,
        corpse_timeout_s=12.0,
        trial_timeout_s=6.0,
        auto_rejoin=rng.random() < 0.6,
        rejoin_after_s=0.2,
        rejoin_at_most_s=2.0,
        max_rejoins=4,
        settled_after_s=3.0,
        isolate_slow=rng.random() < 0.5,
    )


def _limits(rng: Random) -> RankLimits:
    return RankLimits(
        num_blocks=rng.choice((16, 16, 20, 28, 48)),
        block_size=4,
        max_num_seqs=rng.choice((3, 8)),
        max_num_batched_tokens=rng.choice((12, 24)),
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=rng.random() < 0.9,
        prefill_tokens_beside_decodes=rng.choice((0, 6)),
    )


def _arrivals(rng: Random, poison: bool) -> list[Arrival]:
    """Close together, or so far apart that the ranks park in between."""
    common = [tuple(_tokens(rng, rng.choice((8, 12, 17)))) for _ in range(2)]
    over_s = rng.choice((0.1, 0.2, 0.8, 1.5))
    arrivals = [_arrival(rng, common, n, over_s) for n in range(rng.randint(8, 14))]
    if poison:
        params = SamplingParams(seed=0, max_tokens=8)
        prompt = (*_tokens(rng, rng.randint(0, 12)), POISON)
        arrivals.append(Arrival(rng.random() * 0.2, Submission("poison", (prompt,), 1, params)))
    return arrivals


def _arrival(rng: Random, common: list[tuple[int, ...]], number: int, over_s: float) -> Arrival:
    prefix = rng.choice([(), *common])
    prompt = (*prefix, *_tokens(rng, rng.randint(1, 14)))
    # The first one is long, so that every seed has its 30 steps.
    length = 32 if number == 0 else rng.choice((1, 4, 8, 14, 20, 28))
    submission = Submission(
        request_id=f"request {number}",
        prompts=(prompt,) if rng.random() < 0.85 else (prompt, prompt[:-1] or (3,)),
        n=2 if rng.random() < 0.2 else 1,
        params=_params(rng, length, plain=number == 0),
    )
    if number and rng.random() < 0.2:
        submission = _with_stop(rng, submission)
    leaves = number > 0 and rng.random() < 0.12
    return Arrival(
        at_s=rng.random() * over_s if number else 0.0,
        submission=submission,
        abort_after_s=rng.random() * 0.3 if leaves else None,
    )


def _params(rng: Random, length: int, plain: bool) -> SamplingParams:
    return SamplingParams(
        seed=0,
        max_tokens=length,
        min_tokens=rng.choice((0, 0, 3)),
        eos_token_ids=(EOS,) if not plain and rng.random() < 0.3 else (),
        stop_token_ids=(7,) if not plain and rng.random() < 0.15 else (),
        logprobs=1 if rng.random() < 0.15 else None,
        prompt_logprobs=1 if rng.random() < 0.15 else None,
    )


def _with_stop(rng: Random, submission: Submission) -> Submission:
    """A stop string that really occurs in the first choice."""
    text = answers(submission, MAX_MODEL_LEN)[0].text
    if len(text) < 3:
        return submission
    start = rng.randrange(len(text) - 1)
    return replace(submission, stop=StopStrings((text[start : start + 2], "zz")))


def _tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def _fault(rng: Random, kinds: tuple[FaultKind, ...], num_ranks: int, number: int) -> FaultSpec:
    rank, peer = rng.sample(range(num_ranks), 2)
    openers = [kind for kind in kinds if kind in OPENERS]
    if _about_roles(kinds):
        openers = ["switch", "kill"]
    return FaultSpec(
        kind=rng.choice(kinds if number or not openers or rng.random() < 0.4 else openers),
        rank=rank,
        when=_when(rng, number, ("switching",) if _about_roles(kinds) else STAGES),
        peer=peer,
        level=rng.randint(1, 6),
        seconds=rng.choice((0.5, 1.5, 3.0, 6.0)),
    )


def _when(rng: Random, number: int, stages: tuple[str, ...]) -> When:
    if number and rng.random() < 0.8:
        return InStage(rng.choice(stages), rng.random() * 0.006)
    if rng.random() < 0.5:
        return AtTime(rng.random() * 0.4)
    layer, phase = rng.choice(POINTS)
    return AtPoint(rng.randrange(STEPS), layer, phase)
