"""The short cut for the common request: what it takes, what it leaves to the application, and HTTP around it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hot_support import GOOD, HOT, Server, request, talk, until
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from feature_store.errors import UnavailableError
from serving.hot import PATH, PREDICT_PATH
from serving.hot_body import online_body, predict_body
from serving.hot_protocol import HotProtocol
from serving.online_types import entity_rows
from serving.schemas import OnlineRequest, PredictRequest


@pytest.fixture(params=[HotProtocol, "httptools"], ids=["protocol", "asgi"])
def http(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_a_common_request_is_answered_hot_and_any_other_by_the_application(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            unusual = {**GOOD, "at": "2026-01-01T00:00:00Z"}
            unknown = {**GOOD, "feature_service": "t"}
            big = {**GOOD, "entities": {"id": ["a" * 6_000]}}
            for body, expected in ((GOOD, HOT), (unusual, None), (unknown, None), (big, None), (b"{", None)):
                ((status, content),) = await talk(server.port, request(body), count=1)
                sent = body if isinstance(body, bytes) else json.dumps(body).encode()
                assert (status, content) == (200, expected or b"slow " + sent)
            plain = request(GOOD).replace(b"application/json", b"text/plain")
            assert (await talk(server.port, plain, count=1))[0][1].startswith(b"slow")
            assert server.guard.inside == 0

    asyncio.run(run())


def test_a_request_in_pieces_and_pipelined_ones_are_answered_in_order(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            data = request(GOOD)
            ((_, whole),) = await talk(server.port, data[:30], data[30:-5], data[-5:], count=1)
            assert whole == (HOT if http is HotProtocol else b"slow " + json.dumps(GOOD).encode())
            slow = request({**GOOD, "feature_service": "t"})
            got = await talk(server.port, data + slow + data + data, count=4)
            assert [content[:6] for _, content in got] == [HOT[:6], b"slow {", HOT[:6], HOT[:6]]

    asyncio.run(run())


def test_keep_alive_close_is_honoured_and_ids_are_returned(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request(GOOD, "X-Request-Id: mine", "Connection: close"))
            data = await asyncio.wait_for(reader.read(), 10)  # until the server closes
            assert b"x-request-id: mine\r\n" in data
            assert b"connection: close" in data
            assert data.endswith(HOT)
            writer.close()

    asyncio.run(run())


def test_an_error_has_the_one_shape_and_a_bug_is_a_500(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            server.reader.error = UnavailableError("Redis does not answer", next_step="start it")
            ((status, content),) = await talk(server.port, request(GOOD), count=1)
            assert (status, json.loads(content)["error"]["code"]) == (503, "unavailable")
            server.reader.error = None
            server.reader.replied = lambda _: 1 / 0  # type: ignore[assignment,return-value]  # a bug
            ((status, content),) = await talk(server.port, request(GOOD), count=1)
            assert (status, json.loads(content)["error"]["code"]) == (500, "internal")
            text = server.metrics.expose().decode()
            assert f'predictflow_request_seconds_count{{method="POST",route="{PATH}",status="503"}} 1.0' in text
            assert "predictflow_requests_in_flight 0.0" in text
            assert server.guard.inside == 0

    asyncio.run(run())


def test_who_is_not_admitted_goes_to_the_application(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            server.guard.open = False
            assert (await talk(server.port, request(GOOD), count=1))[0][1].startswith(b"slow")

    asyncio.run(run())


def test_a_body_that_has_yet_to_come_holds_a_slot_until_the_client_leaves(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request(GOOD)[:-5])
            await until(lambda: server.guard.inside == 1 or server.seen == 1)
            assert server.guard.inside == (http is HotProtocol)  # without it the application waits, in its own slot
            writer.close()
            await until(lambda: server.guard.inside == 0)

    asyncio.run(run())


def test_who_is_not_admitted_is_told_before_the_body_comes(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            server.guard.open = False
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request(GOOD).partition(b"{")[0])
            await until(lambda: server.seen == 1)
            writer.close()

    asyncio.run(run())


def test_a_body_may_take_its_time_and_no_more(http: Any) -> None:
    async def run() -> None:
        async with Server(http, seconds=0.05) as server:
            head, brace, rest = request(GOOD).partition(b"{")
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head)
            await until(lambda: server.seen == 1)
            assert server.guard.inside == 0
            writer.write(brace + rest)
            async with asyncio.timeout(20):
                assert b"200 OK" in await reader.readuntil(b"slow {")
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("length", ["content-length: 5001", "transfer-encoding: chunked"])
def test_a_body_that_is_too_long_or_of_unknown_length_is_the_applications_from_the_start(length: str) -> None:
    async def run() -> None:
        async with Server(HotProtocol, seconds=0.05) as server:
            lines = [f"POST {PATH} HTTP/1.1", "host: x", "content-type: application/json", length, "", ""]
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write("\r\n".join(lines).encode())
            await until(lambda: server.seen == 1)
            (connection,) = server.uvicorn.server_state.connections
            assert connection._kept is None  # type: ignore[union-attr]  # it is a HotProtocol
            writer.close()

    asyncio.run(run())


def test_the_access_line_names_the_key(http: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "predictflow.access")

    async def run() -> None:
        async with Server(http) as server:
            await talk(server.port, request(GOOD), count=1)
            server.hot._lines.flush()

    asyncio.run(run())
    assert [r.key for r in caplog.records if r.name == "predictflow.access"] == ["mine"]


def test_a_shutdown_waits_for_the_answer_and_a_client_that_left_harms_nobody(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            server.reader.hold = True
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request(GOOD))
            _, gone = await asyncio.open_connection("127.0.0.1", server.port)
            gone.write(request(GOOD))
            while len(server.reader.waiting) < 2:
                await asyncio.sleep(0.01)
            gone.close()
            await asyncio.sleep(0.05)
            for connection in list(server.uvicorn.server_state.connections):
                connection.shutdown()
            for answer in server.reader.waiting:
                answer()
            data = await asyncio.wait_for(reader.read(), 10)  # answered, then closed
            assert data.endswith(HOT)
            writer.close()

    asyncio.run(run())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "k"]), inner, max_size=2),
    max_leaves=4,
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "feature_service": st.just("s") | json_values,
        "features": st.lists(st.text(max_size=3), max_size=2) | json_values,
        "entities": st.dictionaries(st.sampled_from(["id", "k"]), st.lists(json_values, max_size=4)) | json_values,
        "at": st.none() | json_values,
        "full_feature_names": st.booleans() | json_values,
        "other": st.none(),
    },
)


@settings(max_examples=400, deadline=None)
@given(body=bodies)
def test_what_is_taken_is_valid_and_means_the_same_to_the_application(body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    taken = online_body(data, 3)
    try:
        model = OnlineRequest.model_validate(json.loads(data))
    except ValidationError:
        assert taken is None
        return
    if taken is None:
        return
    rows, asked, full_names = taken
    assert model.at is None
    assert asked == (model.feature_service if model.features is None else tuple(model.features))
    assert (model.feature_service is None) != (model.features is None)
    assert rows == entity_rows(model.entities, 3)
    assert full_names == model.full_feature_names


@settings(max_examples=200, deadline=None)
@given(body=bodies)
def test_so_is_what_is_taken_of_predictions(body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    rows = predict_body(data, 3)
    try:
        model = PredictRequest.model_validate(json.loads(data))
    except ValidationError:
        assert rows is None
        return
    if rows is not None:
        assert model.at is None
        assert rows == entity_rows(model.entities, 3)


def ask_for(*ids: str, model: str = "m", **more: Any) -> bytes:
    return request({"entities": {"id": list(ids)}, **more}, path=PREDICT_PATH + model)


def test_a_prediction_is_answered_hot_and_what_is_unusual_by_the_application(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            assert await talk(server.port, ask_for("a", "bcd"), count=1) == [(200, b'{"hot": ["m", "7", 1.0, 3.0]}')]
            assert server.seen == 0
            unusual = [
                ask_for("a", model="other"),
                ask_for("a", model="%6d%20"),
                ask_for("a", at="2026-01-01T00:00:00Z"),
                ask_for("a", "b", "c", "d"),
                ask_for("a", typo=1),
            ]
            for n, body in enumerate(unusual, 1):
                assert (await talk(server.port, body, count=1))[0][1].startswith(b"slow")
                assert server.seen == n
            assert server.guard.inside == 0
            counted = server.metrics.expose().decode()
            route = 'method="POST",route="/api/v1/predict/{model}",status="200"'
            assert f"predictflow_request_seconds_count{{{route}}} 1.0" in counted

    asyncio.run(run())


def test_predictions_that_wait_for_a_model_share_its_next_call_and_not_their_faults(http: Any) -> None:
    async def run() -> None:
        async with Server(http) as server:
            server.pipeline.go.clear()
            asked = [asyncio.create_task(talk(server.port, ask_for("a"), count=1))]
            await until(lambda: server.pipeline.calls == [[1.0]])
            for name in ("bb", "x" * 13, "cccc"):
                asked.append(asyncio.create_task(talk(server.port, ask_for(name), count=1)))
            await until(lambda: server.guard.inside == 4)
            await asyncio.sleep(0.05)
            server.pipeline.go.set()
            answered = [found[0] for found in await asyncio.gather(*asked)]
            assert [status for status, _ in answered] == [200, 200, 500, 200]
            assert json.loads(answered[3][1]) == {"hot": ["m", "7", 4.0]}
            assert json.loads(answered[2][1])["error"]["code"] == "internal"
            assert sorted(server.pipeline.calls[1]) == [2.0, 4.0, 13.0]
            assert len(server.pipeline.calls) <= 6  # the one that failed, and its halves
            assert server.guard.inside == 0

    asyncio.run(run())


def test_a_model_that_takes_too_long_is_answered_and_keeps_its_slot_until_it_ends(http: Any) -> None:
    async def run() -> None:
        async with Server(http, seconds=0.3) as server:
            server.pipeline.go.clear()
            ((status, body),) = await talk(server.port, ask_for("a"), count=1)
            assert (status, json.loads(body)["error"]["code"]) == (504, "timeout")
            assert server.guard.inside == 1
            server.pipeline.go.set()
            await until(lambda: server.guard.inside == 0)
            assert (await talk(server.port, ask_for("a"), count=1))[0][0] == 200

    asyncio.run(run())


def test_a_prediction_that_waits_too_long_is_dropped_and_frees_its_slot(http: Any) -> None:
    async def run() -> None:
        async with Server(http, seconds=0.3) as server:
            server.pipeline.go.clear()
            asked = [asyncio.create_task(talk(server.port, ask_for("a"), count=1))]
            await until(lambda: server.pipeline.calls == [[1.0]])
            asked += [asyncio.create_task(talk(server.port, ask_for("bb"), count=1)) for _ in range(3)]
            assert [found[0][0] for found in await asyncio.gather(*asked)] == [504] * 4
            assert server.guard.inside == 1  # of the one that runs
            server.pipeline.go.set()
            await until(lambda: server.guard.inside == 0)
            assert (await talk(server.port, ask_for("ccc"), count=1))[0][0] == 200
            assert server.pipeline.calls == [[1.0], [3.0]]

    asyncio.run(run())
