import asyncio
import threading

import pytest

from service.engine.channel import Channel
from service.engine.types import StepFailed, TokenEvent


def test_events_come_in_order_and_an_error_is_raised_in_its_place(within):
    async def talk():
        channel = Channel()
        events = [TokenEvent(text, None, 0) for text in "abc"]
        sender = threading.Thread(
            target=lambda: [channel.send(item) for item in [*events, StepFailed("over")]]
        )
        sender.start()
        received = [await channel.receive() for _ in events]
        with pytest.raises(StepFailed, match="over"):
            await channel.receive()
        sender.join()
        return received == events

    assert within(talk())


def test_sending_to_a_closed_loop_says_so_and_raises_nothing():
    async def make():
        return Channel()

    channel = asyncio.run(make())
    assert channel.send(TokenEvent("", None, 0)) is False
