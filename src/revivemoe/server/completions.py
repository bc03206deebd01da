"""How `/v1/completions` writes a choice."""

from collections.abc import Iterable, Sequence

from revivemoe.detokenizer import Vocabulary
from revivemoe.messages.tokens import TokenLogprobs
from revivemoe.server.logprobs import CompletionLogprobs
from revivemoe.server.prompts import TokenIds
from revivemoe.server.schema import CompletionRequest
from revivemoe.streams import Delta, PromptLogprobsReady, Submission


class CompletionShape:
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self,
        form: CompletionRequest,
        submission: Submission,
        echoes: Sequence[str],
        vocabulary: Vocabulary,
    ) -> None:
        """`echoes`: the text of each prompt, used with `echo`."""
        self._form = form
        self._submission = submission
        self._echoes = echoes
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        total = len(submission.prompts) * submission.n
        self._logprobs = [CompletionLogprobs(vocabulary) for _ in range(total)]

    def note_prompt_logprobs(self, ready: PromptLogprobsReady) -> None:
        self._prompt_logprobs[ready.prompt_index] = ready.entries

    def body_extra(self) -> dict[str, object]:
        return {}

    def choice(self, whole: Delta) -> dict[str, object]:
        return self._written(whole, first=True)

    def chunks(self, delta: Delta, first: bool) -> Iterable[dict[str, object]]:
        written = self._written(delta, first)
        shown = self._form.return_token_ids or delta.logprobs or delta.finish_reason
        if written["text"] or shown:
            yield written

    def _written(self, delta: Delta, first: bool) -> dict[str, object]:
        echoes = first and self._form.echo
        echo = self._echoes[delta.index // self._submission.n] if echoes else ""
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
        entries: tuple[TokenLogprobs | None, ...] = delta.logprobs
        if first and self._form.echo:
            token_ids = self._prompt(delta.index) + token_ids
            known = self._prompt_logprobs.get(delta.index // self._submission.n, ())
            entries = (None, *known, *entries)
        return self._logprobs[delta.index].render(token_ids, entries)

    def _prompt(self, index: int) -> TokenIds:
        return self._submission.prompts[index // self._submission.n]
