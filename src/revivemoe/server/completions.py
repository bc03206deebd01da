"""How `/v1/completions` writes a choice."""

from collections.abc import Iterable
from functools import cached_property

from revivemoe.detokenizer import Vocabulary
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.server.logprobs import CompletionLogprobs, TokenNames
from revivemoe.server.prompts import TokenIds, prompt_items
from revivemoe.server.schema import CompletionRequest
from revivemoe.streams import Delta, Piece, PromptLogprobsReady, Submission


class CompletionShape:
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self,
        form: CompletionRequest,
        submission: Submission,
        vocabulary: Vocabulary,
        prompt_only: bool,
    ) -> None:
        """`prompt_only`: no output is told."""
        self.echoes = form.echo
        self._prompt_only = prompt_only
        self._form = form
        self._submission = submission
        self._vocabulary = vocabulary
        self._prompt_pieces: dict[int, list[Piece]] = {}
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        total = len(submission.prompts) * submission.n
        names = TokenNames(vocabulary, form.return_tokens_as_token_ids)
        self._logprobs = [CompletionLogprobs(names) for _ in range(total)]

    def note_prompt_logprobs(self, ready: PromptLogprobsReady) -> None:
        self._prompt_logprobs[ready.prompt_index] = ready.entries

    def body_extra(self) -> dict[str, object]:
        return {}

    def choice(self, whole: Delta) -> dict[str, object]:
        return self._written(whole, first=True)

    def chunks(self, delta: Delta, first: bool) -> Iterable[dict[str, object]]:
        written = self._written(delta, first)
        ids = self._form.return_token_ids and delta.token_ids
        if written["text"] or written["logprobs"] or ids or delta.finish_reason:
            yield written

    def _written(self, delta: Delta, first: bool) -> dict[str, object]:
        echo = self._echo(delta.index) if first and self._form.echo else ""
        written: dict[str, object] = {
            "index": delta.index,
            "text": echo + delta.text,
            "logprobs": self._written_logprobs(delta, first),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._form.return_token_ids:
            written["token_ids"] = list(delta.token_ids)
            if first:
                written["prompt_token_ids"] = list(self._prompt(delta.index))
        return written

    def _written_logprobs(self, delta: Delta, first: bool) -> dict[str, object] | None:
        if self._form.logprobs is None:
            return None
        token_ids: tuple[int, ...] = delta.token_ids
        pieces = list(delta.pieces)
        entries: tuple[TokenLogprobs | None, ...] = delta.logprobs
        if first and self._form.echo:
            token_ids = self._prompt(delta.index) + token_ids
            known = self._prompt_logprobs.get(delta.index // self._submission.n, ())
            entries = (None, *known, *entries)
            pieces = [*self._pieces_of(delta.index), *pieces]
        if not token_ids:
            return None
        return self._logprobs[delta.index].render(token_ids, pieces, entries)

    def _echo(self, index: int) -> str:
        """The prompt as it was sent; with log-probabilities, as its tokens say it (a tokenizer may
        change a text): then they join to it.
        """
        given = self._given[index // self._submission.n]
        cut = self._form.truncate_prompt_tokens is not None
        if isinstance(given, str) and self._form.logprobs is None and not cut:
            return given
        return "".join(piece.text for piece in self._pieces_of(index))

    @cached_property
    def _given(self) -> list[str | list[int]]:
        """Each prompt as it was sent."""
        return prompt_items(self._form.prompt)

    def _pieces_of(self, index: int) -> list[Piece]:
        """Those of the prompt of a choice."""
        prompt = index // self._submission.n
        if prompt not in self._prompt_pieces:
            ids, skip = self._submission.prompts[prompt], self._form.skip_special_tokens
            self._prompt_pieces[prompt] = self._vocabulary.pieces(ids, skip, self._prompt_only)
        return self._prompt_pieces[prompt]

    def _prompt(self, index: int) -> TokenIds:
        return self._submission.prompts[index // self._submission.n]
