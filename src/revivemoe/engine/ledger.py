"""The engine's books: every live request, its token logs, and which rank owns which sequence.

The log is the truth. A rank only holds what it was given and reports what it commits; whatever is
lost with a rank is handed to another one from here, under the same stream.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec

from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.assignment import assignments
from revivemoe.engine.holdings import Holdings
from revivemoe.engine.prefixes import Prefixes
from revivemoe.engine.requests import (
    Arrival,
    Assigned,
    LiveRequest,
    LiveSequence,
    Owner,
    Sink,
    Taken,
)
from revivemoe.engine.stop_strings import Stops
from revivemoe.engine.suspects import Suspects, Victim
from revivemoe.engine.token_log import TokenGap, TokenLog
from revivemoe.ids import Incarnation, RankId, SeqId
from revivemoe.messages.commands import Abort, Add, Command
from revivemoe.messages.reports import Holdings as Told
from revivemoe.messages.reports import Tokens
from revivemoe.messages.tokens import CommittedToken, SequenceSpec, TokenLogprobs
from revivemoe.recovery.world import SequenceView
from revivemoe.sampling_params import SamplingParams
from revivemoe.streams import StreamFailed, Submission, choice_indices

log = logging.getLogger("revivemoe.engine")


class Ledger:
    """Owns all sequences. `send` reaches a rank and never blocks (`recovery.ports`)."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_model_len: int,
        send: Callable[[RankId, Command], None],
        incarnation_of: Callable[[RankId], Incarnation],
        tell_failed: Callable[[str, str], None] = lambda request_id, error: None,
    ) -> None:
        """`tell_failed`: of a request that an error of ours has ended, and what it was."""
        self._vocabulary, self._max_model_len = vocabulary, max_model_len
        self._send, self._incarnation_of = send, incarnation_of
        self._tell_failed = tell_failed
        self._sequences: dict[SeqId, LiveSequence] = {}
        self._serving = False
        self.suspects = Suspects()
        self._prefixes = Prefixes()
        self.holdings = Holdings()
        self._next_seq_id = 0
        self._next_arrival = 0
        self.gaps = 0
        """Reports that skipped a position; each was mended by handing the sequence over anew."""
        self.faults = 0
        """Requests that an error of ours has ended."""

    # ---- admission and routing ---------------------------------------------------------------

    def admit(self, submission: Submission, sink: Sink, degraded: bool) -> LiveRequest:
        """Open the logs of a submission. Its sequences wait for a rank."""
        specials, skipped = self._vocabulary.specials, submission.skip_special_tokens
        stops = Stops(submission.stop, specials, skipped)
        request = LiveRequest(submission, sink, self._next_arrival, stops)
        self._next_arrival += 1
        indices = choice_indices(submission.prompts, submission.n)
        try:
            for index, (prompt, choice) in enumerate(indices):
                self._open(request, index, prompt, choice, degraded)
        except Exception as error:
            self._fail(request, error)
        return request

    def _open(
        self, request: LiveRequest, index: int, prompt: int, choice: int, degraded: bool
    ) -> None:
        submission = request.submission
        params = submission.params
        # Prompt log-probabilities are the same for all choices: the first computes them.
        scored = params.prompt_logprobs if choice == 0 else None
        params = msgspec.structs.replace(params, choice=choice, prompt_logprobs=scored)
        prompt_ids = submission.prompts[prompt]
        log = TokenLog(
            index,
            prompt_ids,
            params,
            request.stops,
            self._vocabulary.detokenizer(prompt_ids, submission.skip_special_tokens),
            self._max_model_len,
            degraded,
        )
        seq_id = SeqId(self._next_seq_id)
        self._next_seq_id += 1
        self._sequences[seq_id] = LiveSequence(seq_id, log, request)
        request.unfinished.add(seq_id)
        if scored is not None and len(prompt_ids) > 1:
            request.held[prompt] = []

    def request_ids(self, seq_ids: Iterable[SeqId]) -> list[str]:
        """The submissions that sequences belong to, if they are unfinished."""
        found = [self._sequences[s] for s in seq_ids if s in self._sequences]
        return [sequence.request.submission.request_id for sequence in found]

    def assign_waiting(self, ranks: Iterable[RankId]) -> list[Assigned]:
        """Give every sequence that has no rank, and can have one, to one of these."""
        assigned = []
        live = self._sequences.values()
        for sequence, target in assignments(live, ranks, self.suspects, self._prefixes):
            if sequence.seq_id in self._sequences:  # it may have failed with one of its request
                moved = Assigned(sequence.seq_id, sequence.num_tokens, sequence.orphan)
                assigned.append(moved)
                self.hand_over(sequence.seq_id, target)
        return assigned

    def run(self, serving: bool) -> None:
        """From now on what has a rank is run, or, not `serving`, is not."""
        self._serving = serving
        for sequence in self._sequences.values() if serving else ():
            sequence.ran = sequence.owner is not None

    def make_room(self, rank: RankId) -> None:
        """Take back what has not got on by a token there: a suspect has waited for it too long."""
        for sequence in self._sequences.values():
            owner = sequence.owner
            if owner is not None and owner[0] == rank and not sequence.proven:
                self._send(rank, Abort(sequence.seq_id))
                self.holdings.drop(sequence.seq_id)
                sequence.owner, sequence.orphan = None, True

    # ---- loss of a rank ----------------------------------------------------------------------

    def orphan(self, rank: RankId) -> list[Victim]:
        """The rank is lost: its sequences have none any more. Returns the requests it may have run:
        what was given to it since the last epoch was left had no part in its end.
        """
        victims: dict[int, Victim] = {}
        for sequence in self._sequences.values():
            if sequence.owner is not None and sequence.owner[0] == rank:
                sequence.owner, sequence.orphan = None, True
                key, request = sequence.request.arrival, sequence.request
                if sequence.ran:
                    proven = sequence.proven and (key not in victims or victims[key].proven)
                    victims[key] = Victim(request, proven)
        self.holdings.lose(rank)
        self._prefixes.forget(rank)
        return list(victims.values())

    def convict(self, request: LiveRequest, message: str) -> None:
        """End one request with an error event: it brings down whoever runs it."""
        self.suspects.convicted(request)
        self._end(request, message, 500)

    # ---- warming another rank ----------------------------------------------------------------

    def owned_by(self, rank: RankId) -> list[SeqId]:
        """Sequences of a rank, oldest first."""
        owned = [s for s in self._sequences.values() if s.owner is not None and s.owner[0] == rank]
        return [s.seq_id for s in sorted(owned, key=lambda s: s.age)]

    def num_output(self, seq_id: SeqId) -> int | None:
        """Tokens committed so far; None once the sequence is finished."""
        sequence = self._sequences.get(seq_id)
        return None if sequence is None else len(sequence.log.output_ids)

    def warm(self, seq_id: SeqId, to: RankId) -> SeqId:
        """Let a rank compute a sequence's KV into its prefix cache, beside the owner's steps."""
        sequence = self._sequences[seq_id]
        shadow = SeqId(self._next_seq_id)
        self._next_seq_id += 1
        self.holdings.hand_over(shadow, (to, self._incarnation_of(to)), 0)
        spec = SequenceSpec(
            seq_id=shadow,
            prompt_ids=[*sequence.log.prompt_ids, *sequence.log.output_ids],
            output_ids=[],
            params=SamplingParams(seed=0, temperature=0.0, max_tokens=1),
            arrival=sequence.request.arrival,
        )
        self._send(to, Add(spec))
        return shadow

    def warming(self, shadow: SeqId) -> bool:
        """Whether a copy is still being computed. Nothing else is kept of it."""
        return self.holdings.owner_of(shadow) is not None

    # ---- what ranks report -------------------------------------------------------------------

    def on_tokens(self, report: Tokens) -> Arrival:
        """Append what belongs to the logs; drop what is stale, repeated or not the owner's."""
        owner = (report.rank, report.incarnation)
        for part in report.prompt_logprobs:
            sequence = self._owned(part.seq_id, owner)
            if sequence is not None:
                self._take_prompt_logprobs(sequence, part.start, part.entries)
        found = [self._take(token, owner) for token in report.tokens]
        taken = [one for one in found if one is not None]
        finished = [one.finish_reason for one in taken if one.finish_reason is not None]
        return Arrival(
            len(taken),
            sum(one.first for one in taken),
            tuple(finished),
            any(one.released for one in taken),
        )

    def _take(self, token: CommittedToken, owner: Owner) -> Taken | None:
        """What goes wrong at one sequence ends its request, and no other."""
        sequence = self._owned(token.seq_id, owner)
        if sequence is None:
            if self.holdings.owner_of(token.seq_id) == owner:  # a copy, computed
                self.holdings.drop(token.seq_id)
            return None
        try:
            return self._append(sequence, token)
        except TokenGap:
            self._refill(sequence)
        except Exception as error:
            self._fail(sequence.request, error)
        return None

    def _append(self, sequence: LiveSequence, token: CommittedToken) -> Taken | None:
        """Raises TokenGap."""
        delta = sequence.log.append(token.position, token.token_id, token.logprobs)
        if delta is None:
            return None
        self.holdings.grow(sequence.seq_id, len(sequence.log.output_ids))
        released = not sequence.proven
        if released:
            sequence.proven = True
            self.suspects.got_on(sequence.request, sequence.seq_id)
        sequence.request.emit(delta)
        if delta.finish_reason is not None:
            self._close(sequence, ended_by_engine=isinstance(delta.stop_reason, str))
        return Taken(token.position == 0, delta.finish_reason, released)

    def _take_prompt_logprobs(
        self, sequence: LiveSequence, start: int, entries: list[TokenLogprobs]
    ) -> None:
        try:
            complete = sequence.log.append_prompt_logprobs(start, entries)
            if complete is not None:
                prompt_index = sequence.log.index // sequence.request.submission.n
                sequence.request.release(prompt_index, complete)
        except TokenGap:
            self._refill(sequence)
        except Exception as error:
            self._fail(sequence.request, error)

    def _owned(self, seq_id: SeqId, owner: Owner) -> LiveSequence | None:
        sequence = self._sequences.get(seq_id)
        return sequence if sequence is not None and sequence.owner == owner else None

    def _refill(self, sequence: LiveSequence) -> None:
        """Tokens are missing between log and rank: hand the sequence over again from the log."""
        self.gaps += 1
        assert sequence.owner is not None
        self.hand_over(sequence.seq_id, sequence.owner[0])

    def _close(self, sequence: LiveSequence, ended_by_engine: bool) -> None:
        """A choice is finished. Ranks see ends by token themselves, ends by text they do not."""
        sequence.log.seal()
        del self._sequences[sequence.seq_id]
        self.holdings.drop(sequence.seq_id)
        if ended_by_engine and sequence.owner is not None:
            self._send(sequence.owner[0], Abort(sequence.seq_id))
        request = sequence.request
        request.unfinished.discard(sequence.seq_id)
        self.suspects.closed(request, sequence.seq_id)
        if not request.unfinished:
            request.end()

    # ---- ends that the engine decides --------------------------------------------------------

    def abort(self, request: LiveRequest) -> None:
        """Forget whatever is unfinished of a request. Idempotent."""
        for seq_id in list(request.unfinished):
            self._close(self._sequences[seq_id], ended_by_engine=True)

    def fail_all(self, message: str, status: int) -> int:
        """End every stream with an error event; returns how many requests that were."""
        requests = {s.request.arrival: s.request for s in self._sequences.values()}
        for request in requests.values():
            self._end(request, message, status)
        return len(requests)

    def _fail(self, request: LiveRequest, error: Exception) -> None:
        """An error of ours, or of the request's sink, at one request: the others go on."""
        request_id, text = request.submission.request_id, f"{type(error).__name__}: {error}"
        log.error("request %s is ended by an internal error", request_id, exc_info=error)
        self.faults += 1
        self._tell_failed(request_id, text)
        self._end(request, f"internal error: {text}", 500)

    def _end(self, request: LiveRequest, message: str, status: int) -> None:
        if not request.ended:
            with suppress(Exception):  # the sink may be what is broken
                request.sink.push(StreamFailed(message, status))
        with suppress(Exception):
            self.abort(request)
            request.end()

    def mark_degraded(self) -> None:
        """Experts are missing from now on."""
        for sequence in self._sequences.values():
            sequence.log.mark_degraded()

    # ---- recovery's `SequenceOwner` ----------------------------------------------------------

    def unfinished(self) -> tuple[SequenceView, ...]:
        return tuple(
            SequenceView(
                s.seq_id,
                s.owner[0] if s.owner else None,
                s.num_tokens,
                s.request.arrival,
                orphan=s.orphan,
                held=s.request in self.suspects,
            )
            for s in self._sequences.values()
        )

    def reconcile(self, rank: RankId, num_output: dict[SeqId, int]) -> int:
        """Make a survivor's holdings agree with the log; returns how many had to be mended."""
        owner = (rank, self._incarnation_of(rank))
        for seq_id in self.holdings.of(owner):
            if seq_id not in self._sequences:
                self.holdings.drop(seq_id)  # copies are not worth while any more
        return self._mend(owner, num_output, None)

    def on_holdings(self, report: Told) -> int:
        """A rank that was asked tells what it holds; returns how many had to be mended."""
        owner = (report.rank, report.incarnation)
        if not self.holdings.answers(owner, report.request):
            return 0
        return self._mend(owner, report.num_output, report.request)

    def _mend(self, owner: Owner, num_output: dict[SeqId, int], request: int | None) -> int:
        wrong, foreign = self.holdings.differences(owner, num_output, request)
        for seq_id in foreign:
            self._send(owner[0], Abort(seq_id))
        for seq_id in wrong:
            if seq_id in self._sequences:
                self.hand_over(seq_id, owner[0])
            else:
                self.holdings.drop(seq_id)
        return len(wrong)

    def hand_over(self, seq_id: SeqId, to: RankId) -> None:
        """Give a sequence to a rank as prompt + committed tokens. To its owner again: afresh.

        Nothing happens if it is finished.
        """
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        try:
            self._hand_over(sequence, to)
        except Exception as error:
            self._fail(sequence.request, error)

    def _hand_over(self, sequence: LiveSequence, to: RankId) -> None:
        seq_id = sequence.seq_id
        owner = (to, self._incarnation_of(to))
        if sequence.owner == owner:
            self._send(to, Abort(seq_id))
        elif sequence.owner is not None and sequence.owner[0] != to:
            self._send(sequence.owner[0], Abort(seq_id))
        sequence.owner, sequence.orphan, sequence.proven = owner, False, False
        sequence.ran = self._serving
        known = sequence.log
        self.holdings.hand_over(seq_id, owner, len(known.output_ids))
        spec = SequenceSpec(
            seq_id=seq_id,
            prompt_ids=list(known.prompt_ids),
            output_ids=list(known.output_ids),
            params=known.params,
            arrival=sequence.request.arrival,
            prompt_logprobs_done=known.num_prompt_logprobs,
        )
        self._send(to, Add(spec))

    @property
    def num_waiting(self) -> int:
        """Sequences without a rank."""
        return sum(s.owner is None for s in self._sequences.values())

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)
