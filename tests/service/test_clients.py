"""The official clients, many at once: conversations side by side, answers left midway, and the same words as alone."""

from __future__ import annotations

import asyncio

import anthropic
import openai
import pytest

from tests.service.conftest import KEYS

GREEDY = {"model": "smollm2", "temperature": 0}


@pytest.fixture
def clients(server):
    """An asynchronous client of each kind."""
    chat = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEYS["alice"], max_retries=0, timeout=120)
    messages = anthropic.AsyncAnthropic(base_url=server.url, api_key=KEYS["alice"], max_retries=0, timeout=120)
    return chat, messages


def running(http) -> float:
    """Requests in the engine now."""
    text = http.get("/metrics").text
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(names))


async def conversation(chat, number: int, num_turns: int) -> list[tuple[str, int, int]]:
    """Turns that resend everything, streamed: each answer, its prompt's tokens, and how many of those were cached."""
    messages = [{"role": "system", "content": "You are a helpful assistant. Answer in a few words."}]
    turns = []
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"This is question {turn} of conversation {number}. And now?"})
        stream = await chat.chat.completions.create(
            messages=messages, max_tokens=6, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        text, usage = "", None
        async for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        messages.append({"role": "assistant", "content": text})
        turns.append((text, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens))
    return turns


def test_64_conversations_at_once_hit_their_own_past_and_say_what_they_say_alone(clients):
    chat, _ = clients

    async def talk():
        async with chat:
            together = await asyncio.gather(*(conversation(chat, number, 2) for number in range(64)))
            return together, [await conversation(chat, number, 2) for number in (0, 31, 63)]

    together, alone = asyncio.run(talk())
    for (_, first, _), (_, second, cached) in together:
        assert second > first
        assert cached >= first // 16 * 16, "all whole pages of the turn before"
    words = [[text for text, *_ in turns] for turns in together]
    assert [words[0], words[31], words[63]] == [[text for text, *_ in turns] for turns in alone]


def test_a_stream_left_in_the_middle_ends_its_request_with_either_client(clients, http):
    chat, messages = clients
    asked = [{"role": "user", "content": "Tell me a very long story."}]

    async def leave():
        async with chat, messages:
            stream = await chat.chat.completions.create(messages=asked, max_tokens=1500, stream=True, **GREEDY)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
            async with messages.messages.stream(messages=asked, max_tokens=1500, model="smollm2") as told:
                async for _ in told.text_stream:
                    break
            waiting = asyncio.create_task(chat.chat.completions.create(messages=asked, max_tokens=1500, **GREEDY))
            while not running(http):
                await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            while running(http):
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 60))
