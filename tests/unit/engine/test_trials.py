"""Requests under suspicion: whoever they died under, they get their turn, and end alone."""

from unit.control_plane import Instance, Sink, answer

from revivemoe.engine.requests import LiveRequest
from revivemoe.engine.suspects import Victim
from revivemoe.ids import RankId, SeqId
from revivemoe.recovery.policy import Policy


def serving(num_ranks: int = 4, **policy: object) -> Instance:
    return Instance(num_ranks, redundant=8 * (num_ranks - 1), policy=Policy(**policy)).start()  # type: ignore[arg-type]


def home_of(instance: Instance, name: str) -> RankId | None:
    """The rank that runs the request, if one does."""
    for view in instance.engine.traffic.ledger.unfinished():
        if instance.engine.traffic.ledger.request_ids([view.seq_id]) == [name]:
            return view.owner
    return None


def kill_home(instance: Instance, name: str) -> bool:
    """Whoever runs the request is killed, as if from outside."""
    home = home_of(instance, name)
    if home is not None:
        instance.die(home)
    return home is not None


def test_a_request_whose_ranks_died_twice_is_tried_alone_and_cleared_by_a_token() -> None:
    instance = serving()
    bystander = instance.submit((9, 9), max_tokens=40, request_id="bystander")
    sink = instance.submit((1, 2), max_tokens=40, request_id="unlucky")
    instance.step(2)
    for _ in range(3):  # it had got on where the first died
        assert kill_home(instance, "unlucky")
    suspects = instance.engine.traffic.ledger.suspects
    assert len(suspects.trials) == 1
    instance.step(1)
    assert not suspects, "a token clears it"
    instance.step(45)
    assert sink.token_ids() == answer((1, 2), 40)
    assert bystander.token_ids() == answer((9, 9), 40)


def test_one_that_kills_by_sigkill_ends_alone() -> None:
    """It took nine processes once, then the instance, and with it six innocent streams."""
    instance = Instance(4, redundant=24, policy=Policy(), auto_rejoin=True).start()
    others = [instance.submit((n, n), max_tokens=60, request_id=f"other {n}") for n in range(6)]
    poison = instance.submit((1, 2), max_tokens=40, request_id="poison")
    deaths = 0
    for _ in range(400):
        while poison.failure is None and kill_home(instance, "poison"):
            deaths += 1
        instance.step(1)
        instance.wait(0.1)
    assert poison.failure is not None
    assert deaths <= 4
    for n, sink in enumerate(others):
        assert sink.token_ids() == answer((n, n), 60)


def saturate(instance: Instance, number: int) -> list[Sink]:
    """New requests on every rank, which have not got on by a token."""
    return [
        instance.submit((number, n), max_tokens=3, request_id=f"{number}.{n}") for n in range(8)
    ]


def test_a_suspect_gets_its_turn_under_saturation() -> None:
    """New requests come all the time, and those that have come do not get on."""
    instance = serving(num_ranks=2)
    suspect = instance.submit((1, 2), max_tokens=4, request_id="suspect")
    instance.step(1)
    home = home_of(instance, "suspect")
    assert home is not None
    said = "RuntimeError: device lost"
    fake = instance.cluster.ranks[home]
    later = [sink for n in range(3) for sink in saturate(instance, n)]
    instance.engine.on_exit(home, fake.incarnation, said, instance.now, by_itself=True)
    instance.cluster.ranks.pop(home, None)
    instance.deliver()
    for number in range(3, 60):
        later += saturate(instance, number)
        instance.wait(0.1)
    assert instance.engine.traffic.ledger.suspects.trials, "room was made for one of them"
    for _ in range(80):
        instance.step(1)
        instance.wait(0.05)
    assert suspect.token_ids() == answer((1, 2), 4)
    assert all(sink.failure is None for sink in later)
    assert not list(instance.engine.epochs.fleet.lives.obligations)


def test_a_suspect_that_runs_for_long_without_harm_is_cleared() -> None:
    instance = serving(trial_timeout_s=8.0)
    instance.submit((1, 2), max_tokens=4, request_id="slow")
    for _ in range(2):
        assert kill_home(instance, "slow")
    assert instance.engine.traffic.ledger.suspects.trials
    instance.wait(20)
    assert not instance.engine.traffic.ledger.suspects


def test_two_suspects_are_tried_at_once_on_different_ranks() -> None:
    instance = serving()
    for name in ("one", "other"):
        instance.submit((len(name), 2), max_tokens=20, request_id=name)
    for name in ("one", "other"):
        for _ in range(1 if name == "other" else 2):
            kill_home(instance, name)
    for view in list(instance.engine.traffic.ledger.unfinished()):
        assert view is not None
    trials = instance.engine.traffic.ledger.suspects.trials
    assert len(trials) == len(instance.engine.traffic.ledger.suspects)


def crash_home(instance: Instance, name: str) -> bool:
    """Whoever runs the request crashes by itself."""
    home = home_of(instance, name)
    if home is None:
        return False
    fake = instance.cluster.ranks.pop(home)
    instance.engine.on_exit(home, fake.incarnation, "boom", instance.now, by_itself=True)
    instance.deliver()
    return True


def test_a_poison_that_takes_its_time_is_convicted_all_the_same() -> None:
    """Longer on trial than a turn may take, and even than a trial: what it did is not forgotten."""
    for takes_s in (6.0, 70.0):
        instance = Instance(4, redundant=24, policy=Policy(), auto_rejoin=True).start()
        poison = instance.submit((1, 2), max_tokens=40, request_id="poison")
        crashes = 0
        while poison.failure is None and crashes < 8:
            crashes += crash_home(instance, "poison")
            instance.wait(takes_s)
        assert poison.failure is not None
        assert crashes <= 4


def test_of_several_choices_only_those_that_lost_their_rank_are_tried() -> None:
    instance = serving()
    instance.submit((1, 2), n=2, max_tokens=60, request_id="two")
    instance.step(2)
    crash_home(instance, "two")
    assert instance.engine.traffic.ledger.suspects.trials
    instance.step(1)
    assert not instance.engine.traffic.ledger.suspects


def test_new_requests_get_ranks_while_many_suspects_are_tried() -> None:
    instance = serving()
    for number in range(40):
        instance.submit((number, 1), max_tokens=60, request_id=f"{number}")
    instance.step(2)
    crash_home(instance, "0")
    new = instance.submit((5, 5), max_tokens=4, request_id="new")
    instance.step(4)
    assert new.token_ids() == answer((5, 5), 4)


def test_a_death_before_a_request_could_run_does_not_count() -> None:
    """All ranks killed one after another, in one recovery: what was moved on never ran there."""
    instance = serving()
    instance.submit((1, 2), max_tokens=20, request_id="moved")
    instance.cluster.hold_resumed = True
    for _ in range(3):
        assert kill_home(instance, "moved")
    assert not instance.engine.traffic.ledger.suspects


def test_a_death_in_the_first_step_counts_before_all_have_been_heard() -> None:
    """Steps begin when all have met: the engine hears of it later, from one after another."""
    instance = serving()
    suspects = instance.engine.traffic.ledger.suspects
    instance.submit((1, 2), max_tokens=20, request_id="moved")
    first = home_of(instance, "moved")
    for fake in instance.cluster.ranks.values():
        fake.meets_nobody = fake.rank == 3 and first != 3
    assert kill_home(instance, "moved")
    assert home_of(instance, "moved") not in (None, first, 3)
    assert not suspects
    assert kill_home(instance, "moved")
    assert suspects, "two ranks have died under it"


def test_with_the_culprit_found_the_others_have_no_strike_left() -> None:
    instance = serving()
    for name in ("poison", "innocent"):
        instance.submit((len(name), 2), max_tokens=60, request_id=name)
    suspects = instance.engine.traffic.ledger.suspects
    found = {r.submission.request_id: r for r in requests_of(instance)}
    both = [Victim(request, proven=False) for request in found.values()]
    suspects.lost(RankId(0), both, "crash")
    suspects.convicted(found["poison"])
    assert not suspects
    alone = [Victim(found["innocent"], proven=False)]
    for rank in (1, 2):
        assert suspects.lost(RankId(rank), alone, f"hang {rank}") is None
        target = suspects.target(found["innocent"], {RankId(rank + 1): 0}, set(), {SeqId(1)})
        assert target == rank + 1


def requests_of(instance: Instance) -> list[LiveRequest]:
    sequences = instance.engine.traffic.ledger._sequences.values()
    return [sequence.request for sequence in sequences]
