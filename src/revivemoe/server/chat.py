"""How `/v1/chat/completions` writes a choice."""

from collections.abc import Iterable, Sequence

from revivemoe.detokenizer import Vocabulary
from revivemoe.server.logprobs import TokenNames, chat_logprobs
from revivemoe.server.messages import plain_messages
from revivemoe.server.schema import ChatRequest
from revivemoe.streams import Delta, PromptLogprobsReady, Submission


class ChatShape:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    echoes = False

    def __init__(self, form: ChatRequest, submission: Submission, vocabulary: Vocabulary) -> None:
        self._form = form
        self._prompt_ids = submission.prompts[0]
        self._names = TokenNames(vocabulary, form.return_tokens_as_token_ids)
        self._echo = _last_words(form) if form.echo else ""

    def note_prompt_logprobs(self, ready: PromptLogprobsReady) -> None:
        """Chat never asks for them."""

    def body_extra(self) -> dict[str, object]:
        if not self._form.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self._prompt_ids)}

    def choice(self, whole: Delta) -> dict[str, object]:
        return {
            "index": whole.index,
            "message": {"role": "assistant", "content": self._echo + whole.text, "refusal": None},
            "logprobs": self._logprobs(whole),
            "finish_reason": whole.finish_reason,
            "stop_reason": whole.stop_reason,
            **self._token_ids(whole.token_ids),
        }

    def chunks(self, delta: Delta, first: bool) -> Iterable[dict[str, object]]:
        if first:
            yield {
                "index": delta.index,
                "delta": {"role": "assistant", "content": self._echo},
                "logprobs": None,
                "finish_reason": None,
                **self._token_ids(()),
            }
        ids = self._form.return_token_ids and delta.token_ids
        shown = ids or delta.logprobs or delta.finish_reason
        if delta.text or shown:
            ended = delta.finish_reason is not None
            yield {
                "index": delta.index,
                "delta": {"content": delta.text} if delta.text else {},
                "logprobs": self._logprobs(delta),
                "finish_reason": delta.finish_reason,
                **self._token_ids(delta.token_ids),
                **({"stop_reason": delta.stop_reason} if ended else {}),
            }

    def _token_ids(self, token_ids: Sequence[int]) -> dict[str, object]:
        return {"token_ids": list(token_ids)} if self._form.return_token_ids else {}

    def _logprobs(self, delta: Delta) -> dict[str, object] | None:
        if not self._form.logprobs or not delta.token_ids:
            return None
        return chat_logprobs(self._names, delta.token_ids, delta.pieces, delta.logprobs)


def _last_words(form: ChatRequest) -> str:
    """What `echo` puts before the answer: the last message, if the answer is of the same role."""
    last = plain_messages(form.messages[-1:], knows_developer=True)[0]
    return str(last["content"]) if last["role"] == "assistant" else ""
