"""The Python client against a server that answers from a script."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from feature_store.errors import NotFoundError, PredictFlowError, UnavailableError, UsageError
from serving.client import AsyncFeatureClient, FeatureClient

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
    asked: list[tuple[str, Any, str | None]] = field(default_factory=list)
    url: str = ""
    headers: list[Any] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    def client(self, **kwargs: Any) -> FeatureClient:
        return FeatureClient(self.url, sleep=self.slept.append, **kwargs)


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script([(200, FEATURES, {})])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(raw) if self.headers["Content-Type"] == "application/json" else raw
            script.headers.append(self.headers)
            script.asked.append((self.path, body, self.headers["X-Request-Id"]))
            status, content, headers = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        do_GET = do_POST

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


def test_predictions_are_made_from_values_of_their_types(script: Script) -> None:
    row = {**FEATURES["rows"][0], "probability": "NaN"}  # type: ignore[index]
    row["values"] = {"charges": "NaN", "since": "2026-01-01T00:00:00Z", "raw": "AP8=", "sets": ["Infinity"], "n": None}
    answer = {
        "model": "m",
        "version": "1",
        "feature_service": "s",
        "feature_types": {
            "charges": "DOUBLE",
            "since": "UNIX_TIMESTAMP",
            "raw": "BYTES",
            "sets": "DOUBLE_SET",
            "n": "INT64",
        },
        "t": FEATURES["t"],
        "predictions": [row],
    }
    script.answers = [(200, answer, {})]
    got = script.client().predict("m", {"id": ["C0"]})
    charges, *others = got.predictions[0].values.values()
    assert charges != charges
    assert others == [datetime(2026, 1, 1, tzinfo=UTC), b"\x00\xff", {float("inf")}, None]
    assert {n: str(t) for n, t in got.to_df().dtypes.items()} == {
        "id": "object",
        "charges": "float64",
        "since": "datetime64[us, UTC]",
        "raw": "object",
        "sets": "object",
        "n": "Int64",
        "probability": "float64",
    }


def test_an_answer_without_types_is_left_as_it_is_and_a_value_of_another_type_is_told(script: Script) -> None:
    values = {"charges": "NaN", "events": 1}
    answer = {**FEATURES, "rows": [{**FEATURES["rows"][0], "values": values}]}  # type: ignore[index]
    script.answers = [(200, answer, {})]
    (row,) = script.client().get_online_features({"id": ["C0"]}, feature_service="s").rows
    assert row.values == values
    script.answers = [(200, {**answer, "feature_types": ["BYTES", "INT64"]}, {})]
    with pytest.raises(PredictFlowError, match="not PredictFlow's"):
        script.client().get_online_features({"id": ["C0"]}, feature_service="s")


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


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = "import sys, serving.client; print({'feast', 'pandas', 'grpc', 'pyarrow', 'confluent_kafka'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_key_is_sent_and_a_bad_url_is_told(script: Script) -> None:
    with script.client(api_key="pf_x") as client:
        client.get_online_features({"id": ["C0"]}, feature_service="s")
    assert script.headers[-1]["Authorization"] == "Bearer pf_x"
    with pytest.raises(UsageError, match=r"grpc://host:port"):
        FeatureClient("localhost:9094")


def test_the_asynchronous_client_asks_retries_and_raises_alike(script: Script) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def main() -> None:
        async with AsyncFeatureClient(script.url, sleep=sleep) as client:
            answer = await client.get_online_features({"id": ["C0", "C1"]}, feature_service="s")
            assert answer.rows[1].statuses["charges"] == "NULL_VALUE"
            script.answers = [(404, error("not_found", ["a"]), {})]
            with pytest.raises(NotFoundError, match="valid: a"):
                await client.predict("m", {"id": ["C0"]})

    script.answers = [(503, error("unavailable"), {"Retry-After": "1"}), (200, FEATURES, {})]
    asyncio.run(main())
    assert len(slept) == 1


def test_a_push_sends_columns_as_json_can_hold_them(script: Script) -> None:
    script.answers = [(200, {"rows": 1, "feature_views": ["v"], "to": "online"}, {})]
    pushed = script.client().push(
        {"id": ["C0"], "b": [b"\xff"], "event_timestamp": [datetime(2026, 1, 1, tzinfo=UTC)]}, feature_view="v"
    )
    assert pushed.feature_views == ["v"]
    path, body, _ = script.asked[0]
    columns = {"id": ["C0"], "b": ["/w=="], "event_timestamp": ["2026-01-01T00:00:00Z"]}
    assert (path, body) == (
        "/api/v1/features/push",
        {"columns": columns, "to": "online_and_offline", "feature_view": "v"},
    )


def test_what_numpy_and_pandas_hold_is_sent_as_python_values(script: Script) -> None:
    import numpy as np
    import pandas as pd

    client = script.client()
    client.get_online_features({"id": np.array([1, 2])}, feature_service="s")
    client.get_online_features(pd.DataFrame({"id": ["C0", None]}), feature_service="s")  # type: ignore[arg-type]
    assert [body["entities"] for _, body, _ in script.asked] == [{"id": [1, 2]}, {"id": ["C0", None]}]
    script.answers = [(200, {"rows": 1, "feature_views": ["v"], "to": "online"}, {})]
    times = pd.Series([pd.Timestamp("2026-01-01T00:00:00.000001"), pd.NaT])
    client.push({"n": pd.Series([1, None], dtype="Int64"), "event_timestamp": times}, feature_view="v")
    assert script.asked[-1][1]["columns"] == {"n": [1, None], "event_timestamp": ["2026-01-01T00:00:00.000001", None]}
    with pytest.raises(UsageError, match="column n: a value of type complex"):
        client.predict("m", {"n": [1j]})


def test_history_comes_as_arrow_also_from_a_job(script: Script) -> None:
    import pyarrow as pa

    table = pa.table({"id": ["C0"], "charges": [1.5]})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    running = {"id": "j/1", "status": "running", "rows_done": 0, "rows_total": 1, "created_at": "2026-01-01T00:00:00Z"}
    done = {**running, "status": "done", "finished_at": "2026-01-01T00:00:01Z", "error": None}
    script.answers = [(202, running, {}), (200, running, {}), (200, done, {}), (200, sink.getvalue(), {})]
    got = script.client().get_historical_features({"id": ["C0"]}, features=["v:charges", "v:n"])
    assert got == table
    paths = [path for path, _, _ in script.asked]
    assert (
        paths[0]
        == "/api/v1/features/historical?as_known=true&full_feature_names=false&features=v%3Acharges&features=v%3An"
    )
    assert pa.ipc.open_stream(script.asked[0][1]).read_all().column_names == ["id"]
    assert paths[1:] == ["/api/v1/jobs/j%2F1"] * 2 + ["/api/v1/jobs/j%2F1/result"]
    failed = {**done, "status": "failed", "error": {"code": "data", "message": "no such column"}}
    script.answers = [(202, running, {}), (200, failed, {})]
    with pytest.raises(PredictFlowError, match="no such column"):
        script.client().get_historical_features({"id": ["C0"]}, feature_service="s")


def test_a_historical_request_that_is_not_answered_in_time_is_not_sent_again() -> None:
    """The server may have started a job for it."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        slept: list[float] = []
        client = FeatureClient(url, timeout=0.2, sleep=slept.append)
        rows = {"id": ["C1"], "event_timestamp": [datetime(2026, 1, 1, tzinfo=UTC)]}
        with pytest.raises(UnavailableError, match="may still be working"):
            client.get_historical_features(rows, feature_service="s")
        assert slept == []
        with pytest.raises(UnavailableError, match="does not answer"):
            client.get_online_features({"id": ["C1"]}, feature_service="s")
        assert len(slept) == 3


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"])
def test_a_historical_request_whose_connection_breaks_is_not_sent_again(answer: bytes) -> None:
    import socket

    taken = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            nonlocal taken
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65_536)
                    taken += 1
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        slept: list[float] = []
        client = FeatureClient(f"http://127.0.0.1:{listener.getsockname()[1]}", retries=2, sleep=slept.append)
        rows = {"id": ["C1"], "event_timestamp": [datetime(2026, 1, 1, tzinfo=UTC)]}
        with pytest.raises(UnavailableError, match="may still be working"):
            client.get_historical_features(rows, feature_service="s")
        assert (taken, slept) == (1, [])
        with pytest.raises(UnavailableError, match="does not answer"):
            client.get_online_features({"id": ["C1"]}, feature_service="s")
        assert (taken, len(slept)) == (4, 2)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    slept.clear()
    with pytest.raises(UnavailableError, match="does not answer"):  # nothing was sent: it may be tried again
        FeatureClient("http://127.0.0.1:1", retries=2, sleep=slept.append).get_historical_features(
            rows, feature_service="s"
        )
    assert len(slept) == 2
