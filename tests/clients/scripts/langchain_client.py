"""`langchain-openai`: the chat model and the one for completions."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
PROMPT = "When a device fails"
COMMON = {
    "base_url": f"{URL}/v1", "model": MODEL, "temperature": 0, "max_tokens": 12,
    "max_retries": 0, "timeout": 30, "extra_body": {"ignore_eos": True},
}  # fmt: skip


class City(BaseModel):
    """A city."""

    name: str


def usage(message):
    told = message.usage_metadata or {}
    return {n: told.get(f"{n}_tokens") for n in ("input", "output", "total")}


def raised(call):
    try:
        call()
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"classes": kinds, "message": str(error)}
    return None


def streamed(chat):
    chunks = list(chat.stream("Hello?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return {
        "parts": [c.content for c in chunks if c.content], "usage": usage(whole),
        "whole": whole.content, "reason": whole.response_metadata["finish_reason"],
    }  # fmt: skip


def errors(chat):
    structured = {
        method: raised(
            lambda m=method: chat.with_structured_output(City, method=m).invoke("Hello?")
        )
        for method in ("json_schema", "function_calling", "json_mode")
    }
    return structured | {
        "tools": raised(lambda: chat.bind_tools([City]).invoke("Hello?")),
        "too long": raised(lambda: chat.invoke("Hello? " * 1500)),
        "too long stream": raised(lambda: list(chat.stream("Hello? " * 1500))),
        "model": raised(lambda: ChatOpenAI(**{**COMMON, "model": "another"}).invoke("x")),
        "key": raised(lambda: ChatOpenAI(**COMMON, api_key="wrong").invoke("x")),
        "responses": raised(lambda: ChatOpenAI(**COMMON, use_responses_api=True).invoke("x")),
    }


def main():
    chat, text = ChatOpenAI(**COMMON, stream_usage=True), OpenAI(**COMMON)
    said = chat.invoke("Hello?")
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke("Hello?")
    written = text.generate([PROMPT, "Once"])
    found = {
        "chat": [said.content, usage(said), said.response_metadata["finish_reason"]],
        "logprobs": [e["logprob"] for e in scored.response_metadata["logprobs"]["content"]],
        "stream": streamed(chat),
        "batch": [m.content for m in chat.batch(["Hello?", "Once", "Two and two"])],
        "text": text.invoke(PROMPT),
        "text stream": list(text.stream(PROMPT)),
        "generated": [g[0].text for g in written.generations],
        "generated usage": written.llm_output["token_usage"],
        "errors": errors(chat),
    }
    print(json.dumps(found))


main()
