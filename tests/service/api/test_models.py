"""GET /v1/models in every state. That the model is listed and found is in tests/service/test_app.py."""

import threading
from urllib.parse import quote

import openai
import pytest

LIST, ONE = "/v1/models", "/v1/models/lab/tiny"


def test_the_list_has_openais_shape_and_one_model(live):
    body = live.get(LIST).json()
    assert body.keys() == {"object", "data"}
    assert body["object"] == "list"
    assert body["data"] == [
        {
            "id": "lab/tiny",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "snugfit",
            "max_model_len": 64,
        }
    ]


def test_what_is_listed_can_be_retrieved_and_is_the_same_each_time(live):
    client = live.client()
    (listed,) = client.models.list()
    assert client.models.retrieve(listed.id) == listed
    assert list(client.models.list()) == [listed]


def test_the_slash_of_an_id_may_be_escaped_or_not(live):
    for path in (ONE, "/v1/models/lab%2Ftiny"):
        assert live.get(path).json()["id"] == "lab/tiny"


@pytest.mark.parametrize("name", ["tiny", "lab/tiny@v1.0", "a b", "模型/小", "100%", "a?b#c", "lab/tiny/"])
def test_whatever_the_model_is_called_it_is_found_by_its_name(running, name):
    with running(served_model_name=name) as live:
        assert live.client().models.list().data[0].id == name
        assert live.get(f"/v1/models/{quote(name, safe='/')}").json()["id"] == name
        assert live.client().chat.completions.create(**live.ask(model=name)).model == name


def test_any_other_id_is_404_and_the_answer_names_the_model_that_is_here(live):
    for asked in ("tiny", "lab", "lab/tiny/", "LAB/TINY", "lab/tiny2", "gpt-4o"):
        response = live.get(f"/v1/models/{asked}")
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "model_not_found"), asked
        assert repr(asked) in error["message"]
        assert "'lab/tiny'" in error["message"]


def test_while_loading_nobody_is_told_of_a_model_not_even_that_another_is_unknown(running):
    begun = threading.Event()

    def never(progress):
        begun.set()
        while True:
            progress(500, 1000)
            threading.Event().wait(0.005)

    with running(start=never, wait=False) as live:
        assert begun.wait(10)
        for path in (LIST, ONE, "/v1/models/other"):
            response = live.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "model_loading")
            assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("5", "5000")


def test_a_dead_engines_model_is_not_listed(live):
    live.engine.alive = False
    for path in (LIST, ONE):
        response = live.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")


def test_a_service_that_stops_lists_nothing_more(running, until):
    with running(drain_seconds=1000) as live, live.service.answering():
        live.signal()
        until(lambda: live.service.draining, "draining")
        with pytest.raises(openai.InternalServerError) as refused:
            live.client().models.list()
        assert refused.value.code == "draining"
