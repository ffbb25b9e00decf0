"""service/tracing.py with the real SDK: its in-memory exporter, and OTLP to a receiver on a real socket."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from loader.usage import UsageError
from service import serve_command, tracing

CANARY = "xyzzy-canary"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
NO_SDK = 'OpenTelemetry\'s SDK is not installed: traces are NOT tested; pip install "snugfit[otel]"'


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def sdk():
    return pytest.importorskip("opentelemetry.sdk.trace", reason=NO_SDK)


@pytest.fixture
def kept(sdk):
    """A Tracing whose spans are kept: `.spans()` are those that have ended, by name."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    one = tracing.Tracing(provider)
    one.spans = lambda: {span.name: span for span in exporter.get_finished_spans()}
    one.all = exporter.get_finished_spans
    return one


@pytest.fixture
def traced(running, kept, until):
    """Runs a service whose spans are kept; `ended(n)` waits for n server spans and gives all by name."""

    def ended(count=1):
        def servers():
            return [span for span in kept.all() if span.kind.name == "SERVER"]

        until(lambda: len(servers()) == count, "the end of the request's span")
        return kept.spans()

    def run(engine=None, **options):
        return running(engine, tracing=kept, **options)

    run.ended, run.all = ended, kept.all
    return run


def parents(spans):
    names = {span.context.span_id: name for name, span in spans.items()}
    return {name: span.parent and names.get(span.parent.span_id) for name, span in spans.items()}


def test_the_queue_ends_when_the_engine_says_so(traced, scripted, until):
    engine = scripted(hold_at=0)
    engine.queued_s = 0.03
    with traced(engine) as live:
        asked = threading.Thread(target=live.post)
        asked.start()
        until(lambda: engine.running, "the request")
        time.sleep(0.05)
        engine.release()
        asked.join()
        queue, prefill = (traced.ended()[name] for name in ("queue", "prefill"))
    assert queue.end_time - queue.start_time == 30_000_000
    assert prefill.end_time - prefill.start_time >= 19_000_000


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_and_its_answer_one_inside_with_its_phases(traced, stream):
    with traced() as live:
        live.post(stream=stream)
        spans = traced.ended()
    answer, phases = "chat lab/tiny", ("queue", "prefill", "decode")
    root = "POST /v1/chat/completions"
    assert parents(spans) == {root: None, answer: root, **dict.fromkeys(phases, answer)}
    queue, prefill, decode = (spans[name] for name in phases)
    assert spans[answer].start_time <= queue.start_time <= queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time <= decode.end_time <= spans[answer].end_time
    assert all(span.status.status_code.name != "ERROR" for span in spans.values())


def test_the_attributes_are_those_of_the_semantic_conventions(traced):
    with traced() as live:
        request_id = live.post(max_tokens=7, temperature=0.5, seed=3).headers["x-request-id"]
        spans = traced.ended()
    assert dict(spans["POST /v1/chat/completions"].attributes) == {
        "http.request.method": "POST", "http.route": "/v1/chat/completions",
        "http.response.header.x-request-id": (request_id,), "http.response.status_code": 200,
        "network.protocol.version": "1.1", "url.path": "/v1/chat/completions", "url.scheme": "http",
    }  # fmt: skip
    found = dict(spans["chat lab/tiny"].attributes)
    assert found.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert found == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "snugfit",
        "gen_ai.request.model": "lab/tiny", "gen_ai.response.model": "lab/tiny",
        "gen_ai.request.max_tokens": 7, "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0, "gen_ai.request.frequency_penalty": 0.0, "gen_ai.request.seed": 3,
        "gen_ai.request.presence_penalty": 0.0, "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 2, "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("stop",),
    }  # fmt: skip


def test_each_of_several_answers_is_a_span_of_the_same_request(traced):
    with traced() as live:
        live.post(n=3)
        traced.ended()
    answers = [span for span in traced.all() if span.name == "chat lab/tiny"]
    assert len({span.context.span_id for span in answers}) == 3
    assert len({span.parent.span_id for span in answers}) == 1


def test_a_trace_that_the_client_began_goes_on(traced):
    with traced() as live:
        live.post(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        root = traced.ended()["POST /v1/chat/completions"]
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)


def test_what_the_client_does_not_want_sampled_is_not(traced, kept):
    with traced() as live:
        live.post(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        live.post()
        traced.ended()
    assert TRACE not in {f"{span.context.trace_id:032x}" for span in kept.all()}


def test_probes_are_no_spans(traced):
    with traced() as live:
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            live.get(path)
        assert list(traced.ended()) == ["GET /v1/models"]


def test_a_path_that_is_no_route_gives_no_name_of_its_own(traced):
    with traced() as live:
        live.get("/no/such/thing")
        assert list(traced.ended()) == ["GET"]


def test_a_failure_marks_its_spans_with_its_type_alone(traced, scripted):
    with traced(scripted(raise_at=1, error=RuntimeError(CANARY))) as live:
        assert live.post().status_code == 500
        spans = traced.ended()
    assert spans["chat lab/tiny"].attributes["error.type"] == "RuntimeError"
    assert spans["POST /v1/chat/completions"].attributes["error.type"] == "500"
    assert all(span.status.status_code.name == "ERROR" for name, span in spans.items() if "chat" in name)
    assert not any(span.events for span in spans.values())


def test_a_client_that_leaves_ends_the_spans_too(traced, scripted, until):
    engine = scripted(pieces="abc", hold_at=1)
    with traced(engine) as live:
        with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=live.ask(stream=True)) as stream:
            next(stream.iter_raw())
        spans = traced.ended()
        assert spans["chat lab/tiny"].attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
        assert not engine.running


def test_no_span_has_a_prompt_an_answer_or_a_key_in_it(traced, scripted):
    words = [{"role": "user", "content": CANARY}]
    with traced(scripted(pieces=(CANARY, "!")), api_key=[CANARY]) as live:
        key = {"authorization": f"Bearer {CANARY}"}
        assert CANARY in live.post(headers=key, messages=words, stop=[f"{CANARY}-end"], user=CANARY).text
        assert live.post(headers=key, messages=[{"role": CANARY, "content": CANARY}]).status_code == 400
        assert live.get(f"/v1/models?q={CANARY}", headers=key).status_code == 200
        live.template.encode = lambda _messages: {}[CANARY]
        assert live.post(headers=key, messages=words).status_code == 500
        traced.ended(4)
    assert len(traced.all()) == 8
    assert not any(CANARY in span.to_json() for span in traced.all())


def test_a_bucket_of_a_histogram_names_the_trace_and_so_does_the_log(traced, service_log):
    from service import logs

    seen = []
    handler = logging.Handler()
    handler.setFormatter(logs.Json())
    handler.emit = lambda record: seen.append(json.loads(handler.format(record)))
    logging.getLogger("service.access").addHandler(handler)
    try:
        with traced(traces="on", exemplars="on") as live:
            live.post()
            trace_id = f"{traced.ended()['POST /v1/chat/completions'].context.trace_id:032x}"
            text = live.get("/metrics", headers={"accept": "application/openmetrics-text"}).text
    finally:
        logging.getLogger("service.access").removeHandler(handler)
    named = {
        (sample.name, sample.exemplar.labels["trace_id"])
        for family in parse(text)
        for sample in family.samples
        if sample.exemplar
    }
    assert named == {("snugfit_time_to_first_token_seconds_bucket", trace_id)}  # the script counts no others
    assert [line["trace_id"] for line in seen if line["path"] == "/v1/chat/completions"] == [trace_id]


# The environment


class Receiver(ThreadingHTTPServer):
    """An OTLP collector: keeps what is posted. `answers` off: it takes the connection and says nothing."""

    daemon_threads = True

    def __init__(self, answers=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.bodies, self.paths = answers, [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.paths.append(self.path)
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        if not self.server.answers:
            time.sleep(60)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    one = Receiver()
    yield one
    one.shutdown()
    one.server_close()


def test_spans_go_where_the_standard_variables_say(sdk, receiver, running, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=NO_SDK)
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab,service.version=9")
    with running(tracing=tracing.begin()) as live:
        live.post()
    assert set(receiver.paths) == {"/v1/traces"}
    messages = [ExportTraceServiceRequest.FromString(body) for body in receiver.bodies]
    resources = [resource for message in messages for resource in message.resource_spans]
    names = {span.name for one in resources for scope in one.scope_spans for span in scope.spans}
    assert names >= {"POST /v1/chat/completions", "chat lab/tiny", "prefill"}
    who = {pair.key: pair.value.string_value for pair in resources[0].resource.attributes}
    assert (who["service.name"], who["service.version"]) == ("snugfit", "9")
    assert who["deployment.environment.name"] == "lab"


def test_a_collector_that_does_not_answer_does_not_hold_up_the_end(sdk, running, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=NO_SDK)
    silent = Receiver(answers=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", silent.url)
    with running(tracing=tracing.begin()) as live:
        live.post()
        live.signal()
        began = time.monotonic()
        live.wait_until_ended()
    assert silent.bodies
    assert time.monotonic() - began < tracing.LAST_SPANS_SECONDS + 2
    silent.server_close()


def test_a_services_own_name_is_what_the_environment_says(sdk, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-in-the-lab")
    resource = tracing.begin()._provider.resource
    assert resource.attributes["service.name"] == "chat-in-the-lab"


def test_where_the_environment_turns_the_sdk_off_no_line_has_a_trace(sdk, running, monkeypatch):
    from service import logs

    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    seen = []
    with running(tracing=tracing.begin()) as live:
        live.template.encode = lambda _messages: seen.append(logs.trace_id.get()) or (1,)
        assert live.post().status_code == 200
        live.post(headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert seen == ["", TRACE]


def test_an_exporter_that_is_not_installed_is_refused_with_those_that_are(sdk, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(UsageError, match=r"'zipkin' is not installed; those that are: .*console"):
        tracing.begin()


def test_grpc_is_another_package(sdk, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(UsageError, match="'otlp_proto_grpc' is not installed"):
        tracing.begin()


def test_without_the_sdk_traces_are_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UsageError, match=r'--traces on: .*pip install "snugfit\[otel\]"') as refused:
        serve_command.run(["--traces", "on"])
    assert refused.value.exit_code == 2
