"""A whole instance in one thread: the real engine over ranks that only keep books.

The clock stands still until a test moves it, and nothing a rank says arrives until a test delivers
it. A rank's tokens are a function of prompt and position, so every stream is known beforehand.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unit.server.tiny_tokenizer import tiny_tokenizer

from revivemoe.config import EngineConfig
from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.engine import Engine
from revivemoe.engine.requests import LiveRequest
from revivemoe.ids import Epoch, Incarnation, RankId, SeqId
from revivemoe.membership.membership import Membership
from revivemoe.membership.placement import Table, place
from revivemoe.membership.topology import deployment
from revivemoe.messages.commands import (
    Abort,
    Add,
    Command,
    Configure,
    DomainSpec,
    Fence,
    TellHoldings,
)
from revivemoe.messages.events import document
from revivemoe.messages.reports import (
    Activity,
    FenceAck,
    Heartbeat,
    Hello,
    Holdings,
    RankStats,
    Ready,
    Report,
    Resumed,
    StepAborted,
    Tokens,
)
from revivemoe.messages.tally import Tally
from revivemoe.messages.tokens import CommittedToken, PromptLogprobs, TokenLogprobs
from revivemoe.recovery.policy import Policy
from revivemoe.sampling_params import SamplingParams
from revivemoe.streams import Delta, StopStrings, StreamEvent, StreamFailed, Submission

TOKENIZER = tiny_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)


class Sink:
    """Keeps what a stream was told."""

    def __init__(self) -> None:
        self.events: list[StreamEvent] = []
        self.ended = 0

    def push(self, event: StreamEvent) -> None:
        assert not self.ended, "an event after the end"
        self.events.append(event)

    def end(self) -> None:
        self.ended += 1

    def deltas(self, index: int = 0) -> list[Delta]:
        return [e for e in self.events if isinstance(e, Delta) and e.index == index]

    def token_ids(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas(index) for token in delta.token_ids]

    @property
    def failure(self) -> StreamFailed | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, StreamFailed) else None


def submission(
    prompt: tuple[int, ...] = (1, 2, 3),
    *,
    n: int = 1,
    prompts: tuple[tuple[int, ...], ...] | None = None,
    stop: tuple[str, ...] = (),
    request_id: str = "request",
    **params: Any,
) -> Submission:
    fields: dict[str, Any] = {"seed": 0, "temperature": 0, "max_tokens": 8} | params
    return Submission(
        request_id=request_id,
        prompts=prompts or (prompt,),
        n=n,
        params=SamplingParams(**fields),
        stop=StopStrings(stop),
    )


def answer(prompt: tuple[int, ...] | list[int], length: int) -> list[int]:
    """What every rank continues this prompt with."""
    return [(sum(prompt) + 7 * k) % 90 for k in range(length)]


@dataclass
class FakeRank:
    """Follows the protocol of a rank: sequences, steps, fence, configure; no batches, no KV."""

    rank: RankId
    incarnation: Incarnation
    say: Any
    live: dict[SeqId, tuple[list[int], list[int], SamplingParams]] = field(default_factory=dict)
    """Prompt, output, parameters."""
    epoch: int = 0
    step: int = 0
    in_domain: bool = False
    mute: bool = False
    """Hears everything, answers nothing."""
    stubborn: bool = False
    """Lives, but answers no fence."""
    activity: Activity = field(default_factory=Activity)
    scores_prompts: bool = False
    """Tells the log-probabilities of prompts where they are asked for."""
    meets_nobody: bool = False
    """Enters domains, but never gets to the first agreement: some member is stuck."""

    def handle(self, command: Command) -> None:
        match command:
            case Add(sequence=spec) if spec.seq_id not in self.live:
                held = (list(spec.prompt_ids), list(spec.output_ids), spec.params)
                self.live[spec.seq_id] = held
            case Abort(seq_id=seq_id):
                self.live.pop(seq_id, None)
            case TellHoldings(request=request):
                self.report(Holdings(self.rank, self.incarnation, request, self.num_output()))
            case Fence(epoch=epoch, at_boundary=planned):
                self.epoch, self.in_domain = epoch, False
                self.acknowledge(epoch, rolled_back=not planned)
            case Configure():
                assert command.step >= self.step
                self.epoch, self.step, self.in_domain = command.epoch, command.step, True
                resumed = Resumed(self.rank, self.incarnation, command.epoch, self.step, 0.25)
                if not self.meets_nobody:
                    self.report(resumed)
            case _:
                pass

    def acknowledge(self, epoch: Epoch, rolled_back: bool = True) -> None:
        if self.stubborn:
            return
        acknowledged = (epoch, self.step, self.num_output(), rolled_back, 0.125)
        self.report(FenceAck(self.rank, self.incarnation, *acknowledged))

    def num_output(self) -> dict[SeqId, int]:
        return {seq_id: len(output) for seq_id, (_, output, _) in self.live.items()}

    def run_step(self) -> None:
        """Commit one token of every sequence."""
        assert self.in_domain
        tokens, scores = [], []
        for seq_id, (prompt, output, params) in list(self.live.items()):
            if self.scores_prompts and params.prompt_logprobs is not None and not output:
                entries = [TokenLogprobs(-1.0, []) for _ in prompt[1:]]
                scores.append(PromptLogprobs(seq_id, 1, entries))
            token = answer(prompt, len(output) + 1)[-1]
            logprobs = None if params.logprobs is None else TokenLogprobs(-0.5, [(token, -0.5)])
            tokens.append(CommittedToken(seq_id, len(output), token, logprobs))
            output.append(token)
            if len(output) == params.max_tokens:
                del self.live[seq_id]
        if tokens:
            told = (self.epoch, self.step, tokens, scores)
            self.report(Tokens(self.rank, self.incarnation, *told))
        self.step += 1

    def beat(self) -> None:
        stats = RankStats(running=len(self.live), kv_blocks_used=2, kv_blocks_total=64)
        holdings = Tally()
        for seq_id, num_output in self.num_output().items():
            holdings = holdings.plus(seq_id, num_output)
        told = (0, stats, self.activity, None, holdings)
        self.report(Heartbeat(self.rank, self.incarnation, *told))

    def abort_step(self) -> None:
        self.in_domain = False
        lost = StepAborted(self.rank, self.incarnation, self.epoch, self.step, "peer is gone")
        self.report(lost)

    def report(self, report: Report) -> None:
        if not self.mute:
            self.say(report)


class FakeCluster:
    """Ranks in memory. What they say lies in `reports` until it is delivered."""

    def __init__(self) -> None:
        self.ranks: dict[RankId, FakeRank] = {}
        self.reports: deque[Report] = deque()
        self.killed: list[RankId] = []
        self.sent: list[tuple[RankId, Command]] = []
        self.maskable = True
        self.hold_resumed = False
        """Whoever is configured gets no further: it loads."""

    def launch(self, rank: RankId, incarnation: Incarnation, slots: Table) -> None:
        fake = FakeRank(rank, incarnation, self.reports.append)
        self.ranks[rank] = fake
        fake.report(Hello(rank, incarnation, 1000 + rank, "here"))
        fake.report(Ready(rank, incarnation, "cpu", 64, 0.5, self.maskable))

    def send(self, rank: RankId, command: Command) -> None:
        self.sent.append((rank, command))
        if self.hold_resumed and isinstance(command, Configure):
            return
        if rank in self.ranks:
            self.ranks[rank].handle(command)

    def kill(self, rank: RankId) -> None:
        self.killed.append(rank)
        self.ranks.pop(rank, None)

    def domain(self) -> DomainSpec:
        return DomainSpec("shm")

    def commands(self, kind: type, rank: int | None = None) -> list[Any]:
        return [c for r, c in self.sent if isinstance(c, kind) and rank in (None, r)]


class Instance:
    """Engine, ranks and a clock."""

    def __init__(
        self,
        num_ranks: int = 4,
        redundant: int = 8,
        policy: Policy | None = None,
        max_model_len: int = 256,
        spare: int = 0,
        auto_rejoin: bool = False,
        expert_ranks: int = 0,
    ) -> None:
        """`auto_rejoin`: lost ranks come back by themselves, whatever `policy` says of that.
        `expert_ranks`: beside `num_ranks` of attention alone."""
        self.now = 100.0
        self.cluster = FakeCluster()
        self.events: list[dict[str, Any]] = []
        topology = deployment(Epoch(1), num_ranks, expert_ranks)
        placement = place(8, [0, 1], topology.experts, redundant, spare)
        config = EngineConfig(
            model_dir=Path("/models/some"),
            data_parallel_size=num_ranks,
            expert_ranks=expert_ranks,
            max_model_len=max_model_len,
            device="cpu",
            policy=replace(policy or Policy(), auto_rejoin=auto_rejoin),
        )
        self.engine = Engine(
            config,
            Membership(topology, placement),
            VOCABULARY,
            self.cluster,
            lambda: self.now,
            lambda event: self.events.append(document(event)),
        )

    def start(self) -> "Instance":
        self.engine.start(self.now)
        self.deliver()
        return self

    def submit(self, prompt: tuple[int, ...] = (1, 2, 3), **options: Any) -> Sink:
        return self.submit_request(prompt, **options)[0]

    def submit_request(
        self, prompt: tuple[int, ...] = (1, 2, 3), **options: Any
    ) -> tuple[Sink, LiveRequest]:
        sink = Sink()
        return sink, self.engine.submit(submission(prompt, **options), sink)

    def deliver(self) -> None:
        """Let the engine take in everything the ranks have said."""
        while self.cluster.reports:
            self.engine.on_report(self.cluster.reports.popleft(), self.now)

    def step(self, count: int = 1, deliver: bool = True) -> None:
        """A step of 10 ms on every rank."""
        for _ in range(count):
            self.now += 0.01
            for fake in list(self.cluster.ranks.values()):
                if fake.in_domain and not fake.mute:
                    fake.run_step()
            if deliver:
                self.deliver()

    def die(self, rank: int, deliver: bool = True) -> None:
        """The process is gone; what it said before may still be under way."""
        fake = self.cluster.ranks.pop(RankId(rank))
        self.engine.on_exit(fake.rank, fake.incarnation, "process exited", self.now)
        if deliver:
            self.deliver()

    def wait(self, seconds: float) -> None:
        """Let time pass, with the engine ticking as it should."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.1)
            for fake in list(self.cluster.ranks.values()):
                fake.beat()
            self.deliver()
            self.engine.tick(self.now)
            self.deliver()

    def stall(self, seconds: float) -> None:
        """The engine itself stands still; what ranks said meanwhile is not delivered yet."""
        self.now += seconds
        self.engine.tick(self.now)

    def named(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]
