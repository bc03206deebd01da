"""An error of the engine's own at one request, or of its stream, ends it alone."""

from typing import Any

import pytest
from unit.control_plane import VOCABULARY, Instance, Sink, answer, submission

from revivemoe.engine.token_log import TokenLog
from revivemoe.ids import RankId
from revivemoe.messages.commands import Abort, Add
from revivemoe.streams import PromptLogprobsReady, StreamEvent

BAD, GOOD = (1, 2, 3), (4, 5)


class Oops(Exception):
    pass


def oops(*_: Any, **__: Any) -> Any:
    raise Oops("no such token")


class BrokenSink(Sink):
    """Its client's side has failed in a way that nobody thought of."""

    def push(self, event: StreamEvent) -> None:
        raise Oops("no such token")

    end = oops


def one_rank() -> Instance:
    return Instance(1, redundant=0).start()


def assert_only_the_bad_one_ends(instance: Instance, bad: Sink, good: Sink) -> None:
    instance.step(8)
    assert good.token_ids() == answer(GOOD, 8)
    assert good.ended == 1
    assert [e.message for e in [bad.failure] if e] == ["internal error: Oops: no such token"]
    assert bad.failure is not None
    assert bad.failure.status == 500
    assert bad.ended == 1
    assert_told_once(instance)


def assert_told_once(instance: Instance) -> None:
    told = {"event": "request_failed", "request": "bad", "error": "Oops: no such token"}
    assert instance.named("request_failed") == [told]
    ledger = instance.engine.traffic.ledger
    assert (ledger.faults, ledger.num_unfinished) == (1, 0)
    assert not any(fake.live for fake in instance.cluster.ranks.values()), "their ranks are free"


@pytest.mark.parametrize("of", ["_detokenizer.push", "_matcher.push", "_shown.push", "_finish"])
def test_tokens_behind_one_that_cannot_be_taken_are_taken(
    monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    instance = one_rank()
    bad, request = instance.submit_request(BAD, request_id="bad", max_tokens=3)
    good = instance.submit(GOOD)
    instance.step()
    (seq_id,) = request.unfinished
    *path, last = of.split(".")
    broken: Any = instance.engine.traffic.ledger._sequences[seq_id].log
    for name in path:
        broken = getattr(broken, name)
    monkeypatch.setattr(broken, last, oops)
    assert_only_the_bad_one_ends(instance, bad, good)


def test_a_sink_that_fails_ends_alone() -> None:
    instance = one_rank()
    instance.engine.submit(submission(BAD, request_id="bad"), BrokenSink())
    good = instance.submit(GOOD)
    instance.step(8)
    assert good.token_ids() == answer(GOOD, 8)
    assert_told_once(instance)


def test_a_sink_that_cannot_be_ended_is_forgotten() -> None:
    instance = one_rank()
    bad = Sink()
    bad.end = oops  # type: ignore[method-assign]
    instance.engine.submit(submission(BAD, request_id="bad", max_tokens=1), bad)
    good = instance.submit(GOOD)
    instance.step(8)
    assert good.token_ids() == answer(GOOD, 8)
    assert_told_once(instance)


def test_a_failure_of_all_reaches_all() -> None:
    instance = one_rank()
    instance.engine.submit(submission(BAD, request_id="bad"), BrokenSink())
    good = instance.submit(GOOD)
    instance.engine.fail("an error")
    assert good.failure is not None
    assert good.ended == 1


def test_all_choices_of_a_request_end_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = one_rank()
    bad, request = instance.submit_request(BAD, request_id="bad", n=3)
    good = instance.submit(GOOD)
    instance.step()
    log = instance.engine.traffic.ledger._sequences[sorted(request.unfinished)[1]].log
    monkeypatch.setattr(log, "append", oops)
    assert_only_the_bad_one_ends(instance, bad, good)
    assert len(bad.deltas(0)) == 2, "it was before"
    assert [len(bad.deltas(choice)) for choice in (1, 2)] == [1, 1]


def test_prompt_logprobs_that_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = one_rank()
    bad, request = instance.submit_request(BAD, request_id="bad", prompt_logprobs=1)
    good = instance.submit(GOOD, prompt_logprobs=1)
    (seq_id,) = request.unfinished
    log = instance.engine.traffic.ledger._sequences[seq_id].log
    monkeypatch.setattr(log, "append_prompt_logprobs", oops)
    instance.cluster.ranks[RankId(0)].scores_prompts = True
    assert_only_the_bad_one_ends(instance, bad, good)
    assert isinstance(good.events[0], PromptLogprobsReady)


@pytest.mark.parametrize("choice", [0, 1])
def test_a_request_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, choice: int) -> None:
    """Nothing of it is left to run."""
    instance = one_rank()
    original, made = VOCABULARY.detokenizer, list[Any]()

    def detokenizer(prompt_ids: Any, skip_special_tokens: bool) -> Any:
        made.append(original(prompt_ids, skip_special_tokens))
        return oops() if len(made) == choice + 1 else made[-1]

    monkeypatch.setattr(VOCABULARY, "detokenizer", detokenizer)
    bad = instance.submit(BAD, request_id="bad", n=3)
    good = instance.submit(GOOD)
    assert [add.sequence.prompt_ids for add in instance.cluster.commands(Add)] == [list(GOOD)]
    assert_only_the_bad_one_ends(instance, bad, good)


def test_a_request_that_cannot_be_handed_over() -> None:
    """Such as one that no message can hold. Its other choices are not tried."""
    instance, send = one_rank(), None
    send = instance.cluster.send

    def refuse(rank: RankId, command: Any) -> None:
        if isinstance(command, Add) and command.sequence.prompt_ids == list(BAD):
            oops()
        send(rank, command)

    instance.engine.traffic.ledger._send = refuse
    bad = instance.submit(BAD, request_id="bad", n=3)
    good = instance.submit(GOOD)
    assert_only_the_bad_one_ends(instance, bad, good)


def test_a_request_that_cannot_be_migrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recovery that would have moved it goes on with the others."""
    instance = Instance(2).start()
    bad, good = (instance.submit(prompt, request_id=name) for prompt, name in (
        (BAD, "bad"), (GOOD, "good")))  # fmt: skip
    instance.submit(GOOD)
    instance.step(2)
    original = TokenLog.num_prompt_logprobs.fget  # type: ignore[attr-defined]
    broken = property(lambda log: oops() if log.prompt_ids == BAD else original(log))
    monkeypatch.setattr(TokenLog, "num_prompt_logprobs", broken)
    instance.die(0)
    assert instance.engine.epochs.serving
    assert len(instance.cluster.commands(Abort)) <= 1
    assert_only_the_bad_one_ends(instance, bad, good)
