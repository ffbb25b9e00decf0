"""Logprobs and cached tokens, over the wire and read by the official SDK."""

import json
import math

import pytest

from service.engine.types import Logprobs, TokenEvent

TOP = ((0, -0.5), (7, -1.5))
# The halves of an emoji (tokens 0 and 1 of the tests' vocabulary), a token whose text is held back and shown
# with the next, and the end of the answer.
EVENTS = (
    TokenEvent("", 0, 1, logprobs=Logprobs(-0.5, TOP), cached_tokens=1),
    TokenEvent("🙂", 1, 2, logprobs=Logprobs(-0.25)),
    TokenEvent("", 7, 3, logprobs=Logprobs(-math.inf)),
    TokenEvent("t7t8", 8, 4, logprobs=Logprobs(-1.0)),
    TokenEvent("", 9, 5, "stop", Logprobs(0.0)),
)
ENTRIES = [
    {
        "token": "\ufffd", "logprob": -0.5, "bytes": [0xF0, 0x9F],
        "top_logprobs": [
            {"token": "\ufffd", "logprob": -0.5, "bytes": [0xF0, 0x9F]},
            {"token": "t7", "logprob": -1.5, "bytes": [0x74, 0x37]},
        ],
    },
    {"token": "\ufffd", "logprob": -0.25, "bytes": [0x99, 0x82], "top_logprobs": []},
    {"token": "t7", "logprob": -9999.0, "bytes": [0x74, 0x37], "top_logprobs": []},
    {"token": "t8", "logprob": -1.0, "bytes": [0x74, 0x38], "top_logprobs": []},
    {"token": "t9", "logprob": 0.0, "bytes": [0x74, 0x39], "top_logprobs": []},
]  # fmt: skip
ASKED = {"logprobs": True, "top_logprobs": 2}


@pytest.fixture
def telling(scripted, running):
    """A running application whose engine gives out these events."""

    class Telling(scripted):
        async def generate(self, request):
            self.requests.append(request)
            for event in self.pieces:
                yield event

    return lambda events=EVENTS: running(Telling(events))


def chunks_of(live, **more):
    text = live.post(stream=True, **ASKED, **more).text
    *frames, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(frame) for frame in frames]


def test_there_is_an_entry_for_every_token_counted_with_its_bytes_and_the_likeliest(telling):
    with telling() as live:
        body = live.post(**ASKED).json()
    assert body["choices"][0]["logprobs"] == {"content": ENTRIES, "refusal": None}
    assert body["choices"][0]["message"]["content"] == "🙂t7t8"
    assert body["usage"]["completion_tokens"] == len(ENTRIES)
    assert live.engine.requests[0].params.logprobs == 2


def test_a_stream_has_the_same_entries_one_in_each_chunk_also_where_the_text_is_held_back(telling):
    with telling() as live:
        first, *chunks, last = (chunk["choices"][0] for chunk in chunks_of(live))
    assert [chunk["logprobs"] for chunk in chunks] == [{"content": [e], "refusal": None} for e in ENTRIES]
    assert [chunk["delta"] for chunk in chunks] == [{"content": text} for text in ("", "🙂", "", "t7t8", "")]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


def test_text_that_came_without_a_token_has_no_entry(telling):
    with telling((*EVENTS[:2], TokenEvent("!", None, 2, "stop"))) as live:
        body = live.post(**ASKED).json()
        chunks = chunks_of(live)
    assert body["choices"][0]["logprobs"]["content"] == ENTRIES[:2]
    assert body["choices"][0]["message"]["content"] == "🙂!"
    assert chunks[-2]["choices"][0]["delta"] == {"content": "!"}
    assert chunks[-2]["choices"][0]["logprobs"] is None


def test_the_sdk_reads_them_streaming_or_not(telling):
    with telling() as live:
        client = live.client().chat.completions
        whole = client.create(**live.ask(**ASKED)).choices[0].logprobs.content
        stream = [chunk.choices[0].logprobs for chunk in client.create(**live.ask(stream=True, **ASKED))]
        with client.stream(**live.ask(**ASKED)) as helper:
            helped = helper.get_final_completion().choices[0].logprobs.content
    streamed = [entry for each in stream if each for entry in each.content]
    assert [entry.model_dump() for entry in whole] == ENTRIES
    assert [entry.model_dump() for entry in streamed] == ENTRIES
    assert [entry.model_dump() for entry in helped] == ENTRIES
    assert b"".join(bytes(entry.bytes) for entry in whole[:2]).decode() == "🙂"


def test_who_does_not_ask_gets_null(live):
    assert live.post().json()["choices"][0]["logprobs"] is None


def test_what_was_cached_is_the_most_that_any_event_tells(telling):
    with telling() as live:
        body = live.post().json()
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
        last = chunks_of(live, stream_options={"include_usage": True})[-1]
        assert last["usage"] == body["usage"]
        typed = live.client().chat.completions.create(**live.ask())
        assert typed.usage.prompt_tokens_details.cached_tokens == 1
