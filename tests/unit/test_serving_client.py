"""The Python client against a server that answers from a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from feature_store.errors import NotFoundError, PredictFlowError, UnavailableError, UsageError
from serving.client import FeatureClient

FEATURES = {
    "t": "2026-01-01T00:00:00.000001Z",
    "feature_service": "s",
    "feature_names": ["charges", "events"],
    "rows": [
        {
            "entity": {"id": f"C{i}"},
            "values": {"charges": charges, "events": 2**53 + 1},
            "statuses": {"charges": "PRESENT" if charges else "NULL_VALUE", "events": "PRESENT"},
            "offsets": {},
            "event_timestamps": {"charges": None, "events": None},
        }
        for i, charges in enumerate([0.1 + 0.2, None])
    ],
}


@dataclass
class Script:
    """What to answer, in turn (the last one again and again), and what was asked."""

    answers: list[tuple[int, Any, dict[str, str]]]
    asked: list[tuple[str, dict[str, Any], str | None]] = field(default_factory=list)
    url: str = ""
    slept: list[float] = field(default_factory=list)

    def client(self, **kwargs: Any) -> FeatureClient:
        return FeatureClient(self.url, sleep=self.slept.append, **kwargs)


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script([(200, FEATURES, {})])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.asked.append((self.path, body, self.headers["X-Request-Id"]))
            status, content, headers = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield script
    server.shutdown()
    thread.join()
    server.server_close()


def error(code: str, valid: list[str] | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": "what", "valid": valid, "next": "do this"}}


def test_features_are_typed_and_become_a_frame(script: Script) -> None:
    answer = script.client().get_online_features({"id": ("C0", "C1")}, feature_service="s", request_id="r")

    assert script.asked == [
        ("/api/v1/features/online", {"entities": {"id": ["C0", "C1"]}, "feature_service": "s"}, "r")
    ]
    assert answer.t == datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)
    frame = answer.to_df()
    assert frame["id"].tolist() == ["C0", "C1"]
    assert frame["charges"].isna().tolist() == [False, True]
    assert frame["charges"][0] == 0.1 + 0.2
    assert frame["events"].tolist() == [2**53 + 1] * 2


def test_a_naive_time_is_sent_as_utc(script: Script) -> None:
    script.client().get_online_features({"id": ["C0"]}, features=["v:f"], at=datetime(2026, 1, 1))
    assert script.asked[0][1]["at"] == "2026-01-01T00:00:00+00:00"


def test_an_unavailable_server_is_asked_again_after_its_pause(script: Script) -> None:
    script.answers = [(503, error("unavailable"), {"Retry-After": "1"})] * 2 + [(200, FEATURES, {})]

    assert script.client().get_online_features({"id": ["C0"]}, feature_service="s").feature_service == "s"
    assert len(script.asked) == 3
    assert all(1.0 <= pause <= 1.2 for pause in script.slept)


def test_it_gives_up_after_its_retries(script: Script) -> None:
    script.answers = [(503, error("clock_not_set"), {})]

    with pytest.raises(UnavailableError, match="what") as raised:
        script.client(retries=2).get_online_features({"id": ["C0"]}, feature_service="s")
    assert raised.value.code == "clock_not_set"
    assert len(script.asked) == 3


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(400, "at_too_early", UsageError), (404, "not_found", NotFoundError), (413, "too_many_rows", UsageError)],
)
def test_a_refusal_is_not_repeated_and_keeps_its_words(
    script: Script, status: int, code: str, kind: type[PredictFlowError]
) -> None:
    script.answers = [(status, error(code, ["a", "b"]), {})]

    with pytest.raises(kind, match="what; valid: a, b; next: do this") as raised:
        script.client().predict("m/x", {"id": ["C0"]})
    assert raised.value.code == code
    assert [path for path, _, _ in script.asked] == ["/api/v1/predict/m%2Fx"]
    assert script.slept == []


def test_a_server_error_is_no_usage_error(script: Script) -> None:
    script.answers = [(500, "oops", {})]
    with pytest.raises(PredictFlowError, match="HTTP 500") as raised:
        script.client().predict("m", {"id": ["C0"]})
    assert not isinstance(raised.value, UsageError)


def test_an_answer_of_something_else_is_told(script: Script) -> None:
    script.answers = [(200, {"hello": 1}, {})]
    with pytest.raises(PredictFlowError, match="not PredictFlow's"):
        script.client().get_online_features({"id": ["C0"]}, feature_service="s")


def test_no_server_at_all_is_unavailable() -> None:
    slept: list[float] = []
    with pytest.raises(UnavailableError, match=r"predictflow serve"):
        FeatureClient("http://127.0.0.1:1", retries=1, sleep=slept.append).predict("m", {"id": ["C0"]})
    assert len(slept) == 1
