import asyncio
import threading

import pytest

from service.engine.channel import Channel, Chosen, Outbox
from service.engine.types import StepFailed


def send(outbox, *mail):
    for channel, item in mail:
        outbox.put(channel, item)
    return outbox.deliver()


def test_tokens_come_in_order_and_an_error_is_raised_after_them(within):
    async def talk():
        channel, received = Channel(), []
        tokens = [Chosen(token_id) for token_id in range(3)]
        outbox = Outbox()
        mail = [(channel, item) for item in [*tokens, StepFailed("over")]]
        sender = threading.Thread(target=lambda: [send(outbox, one) for one in mail])
        sender.start()
        sender.join()
        while len(received) < len(tokens):
            received += await channel.receive()
        with pytest.raises(StepFailed, match="over"):
            await channel.receive()
        return received == tokens

    assert within(talk())


def test_all_that_is_there_is_received_at_once(within):
    async def talk():
        channel, outbox = Channel(), Outbox()
        tokens = [Chosen(token_id) for token_id in range(5)]
        for token in tokens:
            send(outbox, (channel, token))
        await asyncio.sleep(0)
        return await channel.receive() == tokens

    assert within(talk())


def test_a_delivery_wakes_each_loop_once_whatever_the_number_of_channels(within, monkeypatch):
    calls = []

    async def talk():
        loop, outbox = asyncio.get_running_loop(), Outbox()
        channels = [Channel() for _ in range(16)]
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: (calls.append(a), wake(*a)))
        send(outbox, *((channel, Chosen(at)) for at, channel in enumerate(channels)))
        return [(await channel.receive())[0].token_id for channel in channels]

    assert within(talk()) == list(range(16))
    assert len(calls) == 1


def test_nothing_is_delivered_twice(within):
    async def talk():
        channel, outbox = Channel(), Outbox()
        send(outbox, (channel, Chosen(1)))
        send(outbox)
        send(outbox, (channel, Chosen(2)))
        await asyncio.sleep(0)
        return [chosen.token_id for chosen in await channel.receive()]

    assert within(talk()) == [1, 2]


def test_a_closed_loop_is_told_and_the_others_get_their_tokens(within):
    async def make():
        return Channel()

    closed = asyncio.run(make())

    async def talk():
        channel = Channel()
        unreached = send(Outbox(), (closed, Chosen(1)), (channel, Chosen(2)))
        assert unreached == [closed.loop]
        return (await channel.receive())[0].token_id

    assert within(talk()) == 2
