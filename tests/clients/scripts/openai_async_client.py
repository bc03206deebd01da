"""The `openai` client under asyncio: many at once, and one that is left early."""

import asyncio
import json
import sys

import openai

URL, MODEL = sys.argv[1:]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
WORDS = ("Hello?", "When a device fails", "Two and two", "Once")


def messages(content):
    return [{"role": "user", "content": content}]


async def whole(client, content):
    done = await client.chat.completions.create(messages=messages(content), **GREEDY)
    return done.choices[0].message.content


async def parts(client, content):
    asked = {"messages": messages(content), **GREEDY}
    stream = await client.chat.completions.create(**asked, stream=True)
    return "".join([c.choices[0].delta.content or "" async for c in stream])


async def left_early(client):
    """Two chunks of a long answer, then no more."""
    asked = {**GREEDY, "max_tokens": 1900}
    seen = 0
    async with await client.completions.create(prompt="Once", stream=True, **asked) as stream:
        async for _ in stream:
            seen += 1
            if seen == 2:
                break
    return seen


async def cancelled(client):
    task = asyncio.create_task(
        client.completions.create(prompt="Once", **{**GREEDY, "max_tokens": 1900})
    )
    await asyncio.sleep(0.2)
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    return type(outcome).__name__


async def main():
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", max_retries=0, timeout=60) as client:
        everybody = [*WORDS] * 4
        found = {
            "whole": await asyncio.gather(*(whole(client, one) for one in everybody)),
            "parts": await asyncio.gather(*(parts(client, one) for one in everybody)),
            "models": [card.id async for card in client.models.list()],
            "left early": await left_early(client),
            "cancelled": await cancelled(client),
        }
    print(json.dumps(found))


asyncio.run(main())
