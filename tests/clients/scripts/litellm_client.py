"""`litellm` by the name of a provider: chat, completions, streams, and what it makes of errors."""

import json
import sys

import litellm

URL, MODEL, PROVIDER = sys.argv[1:]
MESSAGES = [{"role": "user", "content": "Hello?"}]
PROMPT = "When a device fails"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
COMMON = {
    "api_base": f"{URL}/v1", "api_key": "the-key", "temperature": 0, "max_tokens": 12,
    "extra_body": {"ignore_eos": True}, "num_retries": 0, "timeout": 30,
}  # fmt: skip

litellm.suppress_debug_info = True


def chat(**fields):
    return litellm.completion(
        **{"model": PROVIDER + MODEL, "messages": MESSAGES, **COMMON, **fields}
    )


def text(**fields):
    asked = {"model": PROVIDER + MODEL, "prompt": PROMPT, **COMMON, **fields}
    return litellm.text_completion(**asked)


def usage(done):
    return {n: getattr(done.usage, f"{n}_tokens") for n in ("prompt", "completion", "total")}


def streamed():
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    usages = [usage(c) for c in chunks if getattr(c, "usage", None)]
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    parts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    return {
        "parts": parts, "usages": usages, "built": built.choices[0].message.content,
        "built usage": usage(built), "reasons": [r for r in reasons if r],
    }  # fmt: skip


def raised(call):
    try:
        call()
    except Exception as error:
        same = isinstance(error, litellm.exceptions.BadRequestError)
        name, status = type(error).__name__, getattr(error, "status_code", None)
        return {"class": name, "status": status, "message": str(error), "bad request": same}
    return None


def main():
    long = [{"role": "user", "content": "Hello? " * 1500}]
    done, written = chat(), text()
    scored = chat(logprobs=True, top_logprobs=2)
    found = {
        "chat": [done.choices[0].message.content, usage(done), done.choices[0].finish_reason],
        "chat logprobs": [e["logprob"] for e in scored.choices[0].logprobs.model_dump()["content"]],
        "stream": streamed(),
        "text": [written.choices[0].text, usage(written)],
        "text stream": [c.choices[0].text or "" for c in text(stream=True)],
        "errors": {
            "too long": raised(lambda: chat(messages=long)),
            "too long stream": raised(lambda: list(chat(messages=long, stream=True))),
            "temperature": raised(lambda: chat(temperature=-1)),
            "model": raised(lambda: chat(model=PROVIDER + "another")),
            "key": raised(lambda: chat(api_key="wrong")),
            "tools": raised(lambda: chat(tools=[TOOL])),
            "response_format": raised(lambda: chat(response_format={"type": "json_object"})),
        },
    }
    print(json.dumps(found))


main()
