"""Completions with the official client: one as a stream, and several at once.

python complete_with_openai.py [URL]        pip install openai
"""

from __future__ import annotations

import asyncio
import os
import sys

from openai import AsyncOpenAI

PROMPTS = ["Once upon a time", "There was a king who", "The old woman said"]


async def main(url: str) -> None:
    key = os.environ.get("PDQ_API_KEY", "none")
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
        model = (await client.models.list()).data[0].id
        print(f"model: {model}")

        stream = await client.completions.create(
            model=model, prompt=PROMPTS[0], max_tokens=32, temperature=0, stream=True
        )
        async for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].text, end="", flush=True)
        print()

        # The same seed gives the same tokens, on whichever node each of them is computed.
        answers = await asyncio.gather(
            *(
                client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0.8, seed=7)
                for prompt in PROMPTS
                for _ in range(2)
            )
        )
        for first, second in zip(answers[::2], answers[1::2], strict=True):
            assert first.choices[0].text == second.choices[0].text
            print(repr(first.choices[0].text))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
