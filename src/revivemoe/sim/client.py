"""The clients: each compares what its stream brings with what it must bring."""

from revivemoe.engine.requests import LiveRequest
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.sim.answers import Answer, answers, logprob_of
from revivemoe.sim.scenario import MAX_MODEL_LEN, Arrival
from revivemoe.streams import Delta, PromptLogprobsReady, StreamEvent, StreamFailed, Submission


class Client:
    """One request from admission to its end. The engine's `Sink`."""

    def __init__(self, arrival: Arrival) -> None:
        self.submission: Submission = arrival.submission
        self.request: LiveRequest | None = None
        self.expected: list[Answer] = answers(self.submission, MAX_MODEL_LEN)
        self.received: list[list[int]] = [[] for _ in self.expected]
        self.texts: list[str] = ["" for _ in self.expected]
        self.finished: set[int] = set()
        self.failure: StreamFailed | None = None
        self.refused = False
        """The engine did not take it, because the instance had failed."""
        self.ended = False
        self.aborted = False
        self._scored: set[int] = set()

    @property
    def done(self) -> bool:
        return self.ended or self.refused

    def push(self, event: StreamEvent) -> None:
        assert not self.ended, f"{self._name}: an event after the end"
        assert self.failure is None, f"{self._name}: an event after the failure"
        match event:
            case Delta():
                self._take(event)
            case PromptLogprobsReady():
                self._take_prompt_logprobs(event)
            case StreamFailed():
                self.failure = event

    def end(self) -> None:
        assert not self.ended, f"{self._name}: ended twice"
        self.ended = True
        if not self.aborted and self.failure is None:
            assert len(self.finished) == len(self.expected), f"{self._name}: ended unfinished"

    @property
    def _name(self) -> str:
        return self.submission.request_id

    def _take(self, delta: Delta) -> None:
        index, expected = delta.index, self.expected[delta.index]
        where = f"{self._name} choice {index}"
        assert index not in self.finished, f"{where}: a token after its end"
        start = len(self.received[index])
        self.received[index].extend(delta.token_ids)
        end = len(self.received[index])
        assert tuple(self.received[index][start:]) == expected.token_ids[start:end], (
            f"{where}: {delta.token_ids} at {start}, expected {expected.token_ids[start:end]}"
        )
        self.texts[index] += delta.text
        self._check_logprobs(delta, start, where)
        if delta.finish_reason is not None:
            self._check_end(delta, where)

    def _check_logprobs(self, delta: Delta, start: int, where: str) -> None:
        if self.submission.params.logprobs is None:
            return
        index = delta.index
        prompt = self._prompt(index // self.submission.n)
        history = [*prompt, *self.received[index]]
        wanted = tuple(
            logprob_of(history, len(prompt) + start + i) for i in range(len(delta.token_ids))
        )
        assert delta.logprobs == wanted, f"{where}: log-probabilities of other tokens"

    def _check_end(self, delta: Delta, where: str) -> None:
        expected = self.expected[delta.index]
        self.finished.add(delta.index)
        assert len(self.received[delta.index]) == len(expected.token_ids), f"{where}: too short"
        ended = (delta.finish_reason, delta.stop_reason)
        assert ended == (expected.finish_reason, expected.stop_reason), f"{where}: ends as {ended}"
        assert self.texts[delta.index] == expected.text, f"{where}: another text"

    def _take_prompt_logprobs(self, event: PromptLogprobsReady) -> None:
        prompt = self._prompt(event.prompt_index)
        assert event.prompt_index not in self._scored, f"{self._name}: scored twice"
        self._scored.add(event.prompt_index)
        wanted: tuple[TokenLogprobs, ...] = tuple(
            logprob_of(prompt, position) for position in range(1, len(prompt))
        )
        assert event.entries == wanted, f"{self._name}: wrong prompt log-probabilities"

    def _prompt(self, index: int) -> tuple[int, ...]:
        return self.submission.prompts[index]
