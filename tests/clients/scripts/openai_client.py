"""The `openai` client, synchronous: what each call brings, or raises."""

import json
import sys

import openai

URL, MODEL = sys.argv[1:]
PROMPT = "When a device fails"
MESSAGES = [{"role": "user", "content": "Hello?"}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
USAGE = {"include_usage": True}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

client = openai.OpenAI(base_url=f"{URL}/v1", max_retries=0, timeout=30)
complete, chat = client.completions.create, client.chat.completions.create


def text_and_usage(done):
    return [done.choices[0].text, done.usage.model_dump(exclude_none=True)]


def answer_and_usage(done):
    return [done.choices[0].message.content, done.usage.model_dump(exclude_none=True)]


def streamed(chunks, said):
    """The parts of the text, and what is said of usage."""
    chunks = list(chunks)
    parts = [said(c.choices[0]) for c in chunks if c.choices]
    usages = [c.usage.model_dump(exclude_none=True) for c in chunks if c.usage]
    return {"parts": [p for p in parts if p], "usages": usages}


def events():
    """`client.chat.completions.stream`: the client puts the answer together itself."""
    with client.chat.completions.stream(messages=MESSAGES, **GREEDY) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        try:
            final = stream.get_final_completion()
        except openai.LengthFinishReasonError as cut:
            final = cut.completion
    return {"deltas": deltas, "content": final.choices[0].message.content}


def raw():
    asked = {"prompt": PROMPT, "extra_headers": {"X-Request-Id": "mine"}, **GREEDY}
    whole = client.completions.with_raw_response.create(**asked)
    with client.completions.with_streaming_response.create(**asked, stream=True) as stream:
        lines = [line for line in stream.iter_lines() if line]
        kind = stream.headers["content-type"]
    return {
        "content_type": whole.headers["content-type"], "id": whole.parse().id,
        "stream_content_type": kind, "last_line": lines[-1], "num_lines": len(lines),
    }  # fmt: skip


def raised(call):
    try:
        call()
    except openai.OpenAIError as error:
        known = ("status_code", "message", "code", "param", "type")
        return {"class": type(error).__name__} | {n: getattr(error, n, None) for n in known}
    return None


def errors():
    def ask(**fields):
        return lambda: complete(**{"prompt": PROMPT, **GREEDY, **fields})

    brief = client.with_options(timeout=0.3)
    stranger = client.with_options(api_key="wrong")
    nobody = client.with_options(base_url="http://127.0.0.1:9/v1")
    long = {**GREEDY, "max_tokens": 1900, "prompt": PROMPT}
    calls = {
        "temperature": ask(temperature=-1),
        "model": ask(model="another"),
        "too long": ask(prompt=[7] * 4000),
        "too long stream": ask(prompt=[7] * 4000, stream=True),
        "unknown field": ask(extra_body={"colour": "red"}),
        "tools": lambda: chat(messages=MESSAGES, tools=[TOOL], **GREEDY),
        "key": lambda: stranger.completions.create(prompt=PROMPT, **GREEDY),
        "key of models": lambda: stranger.models.list(),
        "timeout": lambda: brief.completions.create(**long),
        "connection": lambda: nobody.models.list(),
        "responses": lambda: client.responses.create(model=MODEL, input="x"),
        "embeddings": lambda: client.embeddings.create(model=MODEL, input="x"),
        "no such model": lambda: client.models.retrieve("another"),
    }
    return {name: raised(call) for name, call in calls.items()}


def main():
    found = {
        "models": [card.id for card in client.models.list()],
        "model": client.models.retrieve(MODEL).model_dump(),
        "completion": text_and_usage(complete(prompt=PROMPT, **GREEDY)),
        "completion stream": streamed(
            complete(prompt=PROMPT, stream=True, stream_options=USAGE, **GREEDY), lambda c: c.text
        ),
        "completion logprobs": complete(prompt=PROMPT, logprobs=2, echo=True, **GREEDY)
        .choices[0].logprobs.model_dump(),
        "chat": answer_and_usage(chat(messages=MESSAGES, **GREEDY)),
        "chat stream": streamed(
            chat(messages=MESSAGES, stream=True, stream_options=USAGE, **GREEDY),
            lambda c: c.delta.content,
        ),
        "chat logprobs": chat(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
        .choices[0].logprobs.model_dump(),
        "events": events(),
        "raw": raw(),
        "extra_body": complete(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=6,
            extra_body={"ignore_eos": True, "return_token_ids": True, "top_k": 1},
        ).choices[0].model_extra["token_ids"],
        "errors": errors(),
    }  # fmt: skip
    print(json.dumps(found))


main()
