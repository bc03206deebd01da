"""The `openai` client where nothing is answered for long: what a body raises, a stream's text."""

import asyncio
import json
import sys

import openai

URL, MODEL = sys.argv[1:]
ASKED = {"model": MODEL, "prompt": "When a device fails", "max_tokens": 4}


async def body(client):
    await client.completions.create(**ASKED)


async def stream(client):
    chunks = await client.completions.create(**ASKED, stream=True)
    return "".join([chunk.choices[0].text async for chunk in chunks])


def told(error):
    known = ("status_code", "message", "code")
    return {"class": type(error).__name__} | {name: getattr(error, name, None) for name in known}


async def main():
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", max_retries=0, timeout=90) as client:
        asked = (body(client), stream(client))
        error, text = await asyncio.gather(*asked, return_exceptions=True)
    print(json.dumps([told(error), text if isinstance(text, str) else told(text)]))


asyncio.run(main())
