"""The engine's books: every live request, its token logs, and which rank owns which sequence.

The log is the truth. A rank only holds what it was given and reports what it commits; whatever is
lost with a rank is handed to another one from here, under the same stream.
"""

from collections.abc import Callable, Iterable

import msgspec

from revivemoe.detokenizer import Vocabulary
from revivemoe.engine.requests import Arrival, Assigned, LiveRequest, LiveSequence, Sink
from revivemoe.engine.suspects import Suspects, Victim
from revivemoe.engine.token_log import TokenGap, TokenLog
from revivemoe.ids import Incarnation, RankId, SeqId
from revivemoe.messages.commands import Abort, Add, Command
from revivemoe.messages.reports import Tokens
from revivemoe.messages.tokens import CommittedToken, SequenceSpec, TokenLogprobs
from revivemoe.recovery.world import SequenceView
from revivemoe.sampling_params import SamplingParams
from revivemoe.streams import Delta, StreamFailed, Submission, choice_indices

Owner = tuple[RankId, Incarnation]


class Ledger:
    """Owns all sequences. `send` reaches a rank and never blocks (`recovery.ports`)."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_model_len: int,
        send: Callable[[RankId, Command], None],
        incarnation_of: Callable[[RankId], Incarnation],
    ) -> None:
        self._vocabulary, self._max_model_len = vocabulary, max_model_len
        self._send, self._incarnation_of = send, incarnation_of
        self._sequences: dict[SeqId, LiveSequence] = {}
        self.suspects = Suspects()
        self._next_seq_id = 0
        self._next_arrival = 0
        self._shadows: dict[SeqId, Owner] = {}
        """Copies that only warm a prefix cache, and the process that runs each."""
        self.gaps = 0
        """Reports that skipped a position; each was mended by handing the sequence over anew."""

    # ---- admission and routing ---------------------------------------------------------------

    def admit(self, submission: Submission, sink: Sink, degraded: bool) -> LiveRequest:
        """Open the logs of a submission. Its sequences wait for a rank."""
        request = LiveRequest(submission, sink, self._next_arrival)
        self._next_arrival += 1
        for index, (prompt, choice) in enumerate(choice_indices(submission.prompts, submission.n)):
            self._open(request, index, prompt, choice, degraded)
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
            submission.stop,
            self._vocabulary.detokenizer(prompt_ids),
            self._max_model_len,
            degraded,
        )
        seq_id = SeqId(self._next_seq_id)
        self._next_seq_id += 1
        self._sequences[seq_id] = LiveSequence(seq_id, log, request)
        request.unfinished.add(seq_id)
        if scored is not None and len(prompt_ids) > 1:
            request.held[prompt] = []

    def request_id(self, seq_id: SeqId) -> str:
        """The submission an unfinished sequence belongs to."""
        return self._sequences[seq_id].request.submission.request_id

    def assign_waiting(self, ranks: Iterable[RankId]) -> list[Assigned]:
        """Give every sequence without a rank to the one with the fewest tokens, oldest first.

        Of suspects, each rank is given one request at a time.
        """
        load, unproven = dict.fromkeys(ranks, 0), set[RankId]()
        waiting = []
        for sequence in self._sequences.values():
            if sequence.owner is None:
                waiting.append(sequence)
                continue
            rank = sequence.owner[0]
            if not sequence.proven:
                unproven.add(rank)
            if rank in load:
                load[rank] += sequence.num_tokens
        assigned = []
        for sequence in sorted(waiting, key=lambda s: s.age):
            target = self.suspects.target(sequence.request, load, unproven)
            if target is None:
                continue
            load[target] += sequence.num_tokens
            unproven.add(target)
            assigned.append(Assigned(sequence.seq_id, sequence.num_tokens, sequence.orphan))
            self.hand_over(sequence.seq_id, target)
        return assigned

    def make_room(self, rank: RankId) -> None:
        """Take back what has not got on by a token there: a suspect has waited for it too long."""
        for sequence in self._sequences.values():
            owner = sequence.owner
            if owner is not None and owner[0] == rank and not sequence.proven:
                self._send(rank, Abort(sequence.seq_id))
                sequence.owner, sequence.orphan = None, True

    # ---- loss of a rank ----------------------------------------------------------------------

    def orphan(self, rank: RankId) -> list[Victim]:
        """The rank is lost: its sequences have none any more. Returns the requests it ran."""
        victims: dict[int, Victim] = {}
        for sequence in self._sequences.values():
            if sequence.owner is not None and sequence.owner[0] == rank:
                sequence.owner, sequence.orphan = None, True
                key, request = sequence.request.arrival, sequence.request
                proven = sequence.proven and (key not in victims or victims[key].proven)
                victims[key] = Victim(request, proven)
        self._shadows = {s: owner for s, owner in self._shadows.items() if owner[0] != rank}
        return list(victims.values())

    def convict(self, request: LiveRequest, message: str) -> None:
        """End one request with an error event: it brings down whoever runs it."""
        self.suspects.convicted(request)
        request.sink.push(StreamFailed(message, 500))
        self.abort(request)

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
        self._shadows[shadow] = (to, self._incarnation_of(to))
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
        """Whether a copy is still being computed."""
        return shadow in self._shadows

    # ---- what ranks report -------------------------------------------------------------------

    def on_tokens(self, report: Tokens) -> Arrival:
        """Append what belongs to the logs; drop what is stale, repeated or not the owner's."""
        owner = (report.rank, report.incarnation)
        for part in report.prompt_logprobs:
            sequence = self._owned(part.seq_id, owner)
            if sequence is not None:
                self._append_prompt_logprobs(sequence, part.start, part.entries)
        new_tokens, first_tokens, finished, released = 0, 0, [], False
        for token in report.tokens:
            if self._shadows.get(token.seq_id) == owner:
                del self._shadows[token.seq_id]
            sequence = self._owned(token.seq_id, owner)
            delta = self._append(sequence, token) if sequence is not None else None
            if sequence is None or delta is None:
                continue
            new_tokens += 1
            first_tokens += token.position == 0
            if not sequence.proven:
                sequence.proven = released = True
                self.suspects.got_on(sequence.request, sequence.seq_id)
            sequence.request.emit(delta)
            if delta.finish_reason is not None:
                finished.append(delta.finish_reason)
                self._close(sequence, ended_by_engine=isinstance(delta.stop_reason, str))
        return Arrival(new_tokens, first_tokens, tuple(finished), released)

    def _append(self, sequence: LiveSequence, token: CommittedToken) -> Delta | None:
        try:
            return sequence.log.append(token.position, token.token_id, token.logprobs)
        except TokenGap:
            self._refill(sequence)
            return None

    def _append_prompt_logprobs(
        self, sequence: LiveSequence, start: int, entries: list[TokenLogprobs]
    ) -> None:
        try:
            complete = sequence.log.append_prompt_logprobs(start, entries)
        except TokenGap:
            self._refill(sequence)
            return
        if complete is not None:
            prompt_index = sequence.log.index // sequence.request.submission.n
            sequence.request.release(prompt_index, complete)

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
        if ended_by_engine and sequence.owner is not None:
            self._send(sequence.owner[0], Abort(sequence.seq_id))
        request = sequence.request
        request.unfinished.discard(sequence.seq_id)
        self.suspects.closed(request, sequence.seq_id)
        if not request.unfinished:
            request.sink.end()

    # ---- ends that the engine decides --------------------------------------------------------

    def abort(self, request: LiveRequest) -> None:
        """Forget whatever is unfinished of a request. Idempotent."""
        for seq_id in list(request.unfinished):
            self._close(self._sequences[seq_id], ended_by_engine=True)

    def fail_all(self, message: str, status: int) -> int:
        """End every stream with an error event; returns how many requests that were."""
        requests = {s.request.arrival: s.request for s in self._sequences.values()}
        for request in requests.values():
            request.sink.push(StreamFailed(message, status))
            self.abort(request)
        return len(requests)

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
        mended = 0
        for seq_id in num_output:
            if self._owned(seq_id, owner) is None:
                self._shadows.pop(seq_id, None)
                self._send(rank, Abort(seq_id))
        for sequence in self._sequences.values():
            if sequence.owner != owner:
                continue
            if num_output.get(sequence.seq_id) != len(sequence.log.output_ids):
                self.hand_over(sequence.seq_id, rank)
                mended += 1
        return mended

    def hand_over(self, seq_id: SeqId, to: RankId) -> None:
        """Give a sequence to a rank as prompt + committed tokens. To its owner again: afresh."""
        sequence = self._sequences[seq_id]
        owner = (to, self._incarnation_of(to))
        if sequence.owner == owner:
            self._send(to, Abort(seq_id))
        elif sequence.owner is not None and sequence.owner[0] != to:
            self._send(sequence.owner[0], Abort(seq_id))
        sequence.owner, sequence.orphan, sequence.proven = owner, False, False
        log = sequence.log
        spec = SequenceSpec(
            seq_id=seq_id,
            prompt_ids=list(log.prompt_ids),
            output_ids=list(log.output_ids),
            params=log.params,
            arrival=sequence.request.arrival,
            prompt_logprobs_done=log.num_prompt_logprobs,
        )
        self._send(to, Add(spec))

    @property
    def num_waiting(self) -> int:
        """Sequences without a rank."""
        return sum(s.owner is None for s in self._sequences.values())

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)
