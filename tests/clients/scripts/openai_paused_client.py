"""The `openai` client where nothing is answered for long: a body, a stream, what each raises."""

import asyncio
import json
import sys

import openai

URL, MODEL = sys.argv[1:]
ASKED = {"model": MODEL, "prompt": "When a device fails", "max_tokens": 4}


async def body(client):
    await client.completions.create(**ASKED)


async def stream(client):
    async for _ in await client.completions.create(**ASKED, stream=True):
        pass


def told(error):
    known = ("status_code", "message", "code")
    return {"class": type(error).__name__} | {name: getattr(error, name, None) for name in known}


async def main():
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", max_retries=0, timeout=90) as client:
        asked = (body(client), stream(client))
        errors = await asyncio.gather(*asked, return_exceptions=True)
    print(json.dumps([told(error) for error in errors]))


asyncio.run(main())
