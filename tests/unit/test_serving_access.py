"""API keys, scopes, slots and the time budget: what the gate lets through, and how the server says no."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient
from test_serving_app import Server

from feature_store.errors import NotFoundError, UsageError
from predictflow.cli_serve_key import serve_key
from serving.access import OPEN_PATHS, SCOPES, Keys, add_key, drop_key, read_keys, scope_of
from serving.limits import Gate

READ_BODY = {"feature_service": "s", "entities": {"id": ["a"]}}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def headers(**named: str) -> dict[bytes, bytes]:
    return {name.replace("_", "-").encode(): value.encode() for name, value in named.items()}


def test_the_file_holds_digests_and_never_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "reader", ["read"])

    assert key not in path.read_text()
    assert hashlib.sha256(key.encode()).hexdigest() in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert [(k.name, set(k.scopes)) for k in read_keys(path)] == [("reader", {"read"})]


@pytest.mark.parametrize(
    ("name", "scopes", "says"),
    [("reader", ["read"], "of this name"), ("a b", ["read"], "not a name"), ("x", ["rw"], "rw")],
)
def test_a_key_that_cannot_be_made_leaves_the_file_as_it_was(
    tmp_path: Path, name: str, scopes: list[str], says: str
) -> None:
    path = tmp_path / "keys"
    add_key(path, "reader", ["read"])
    before = path.read_bytes()

    with pytest.raises(UsageError, match=says):
        add_key(path, name, scopes)

    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["reader read", "reader read xyz", f"reader rw {'0' * 64}", f"re/ad read {'0' * 64}"])
def test_a_malformed_line_is_named_by_its_number_and_not_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# keys\n{line}\n")
    with pytest.raises(UsageError) as error:
        Keys(path)
    assert "line 2" in error.value.message or "rw" in error.value.message
    assert "0" * 64 not in error.value.message


def test_a_file_without_keys_is_refused_at_start_and_revokes_all_later(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# none\n")
    with pytest.raises(UsageError, match="no API key"):
        Keys(path)

    key = add_key(path, "reader", ["read"])
    keys = Keys(path)
    drop_key(path, "reader")
    assert keys.find(key.encode()) is not None  # until it is read again
    assert keys.refresh()
    assert keys.find(key.encode()) is None
    with pytest.raises(NotFoundError):
        drop_key(path, "reader")


def test_a_file_that_broke_leaves_the_keys_in_force(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "reader", ["read"])
    keys = Keys(path)
    path.write_text("broken")
    with pytest.raises(UsageError):
        keys.refresh()
    assert keys.find(key.encode()) is not None


def test_a_file_stays_its_servers_when_somebody_else_changes_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add_key(path, "reader", ["read"])
    path.chmod(0o640)
    owner = (path.stat().st_uid, path.stat().st_gid)
    if os.geteuid() == 0:
        owner = (4711, 4712)
        os.chown(path, *owner)

    add_key(path, "other", ["read"])
    drop_key(path, "reader")

    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (*owner, 0o640)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_the_gate_knows_keys_by_either_header_and_scopes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    reader, admin = add_key(path, "reader", ["read"]), add_key(path, "admin", ["admin"])
    gate = Gate(Keys(path))

    def code(given: dict[bytes, bytes], scope: str) -> str | None:
        error = gate.guard(given, scope)
        return None if error is None else error.code

    assert code(headers(authorization=f"bearer {reader}"), "read") is None
    assert code(headers(x_api_key=reader), "read") is None
    assert code(headers(x_api_key=reader), "write") == "forbidden"
    assert [code(headers(x_api_key=admin), scope) for scope in SCOPES] == [None] * 4
    assert code({}, "read") == "unauthorized"
    assert code(headers(authorization=f"Basic {reader}"), "read") == "unauthorized"
    assert code(headers(x_api_key=reader[:-1]), "read") == "unauthorized"
    assert Gate().guard({}, "admin") is None


def test_every_route_needs_the_scope_of_what_it_does() -> None:
    app = Server().app
    needed = {(path, method): scope_of(path) for path, ops in app.openapi()["paths"].items() for method in ops}

    assert {path for (path, _), scope in needed.items() if scope is None} == OPEN_PATHS - {
        "/docs",
        "/docs/oauth2-redirect",
        "/openapi.json",
    }
    assert {path for (path, _), scope in needed.items() if scope == "write"} == {
        "/api/v1/features/push",
        "/push",
        "/write-to-online-store",
    }
    assert {path for (path, _), scope in needed.items() if scope == "predict"} == {"/api/v1/predict/{model}"}


def test_a_server_with_keys_asks_for_them_and_probes_stay_open(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    reader, predictor = add_key(path, "reader", ["read"]), add_key(path, "predictor", ["predict"])
    server = Server(Keys(path))
    with TestClient(server.app, raise_server_exceptions=False) as client:

        def ask(given: dict[str, str]) -> Any:
            return client.post("/api/v1/features/online", json=READ_BODY, headers=given)

        assert ask(bearer(reader)).status_code == 200
        refused = ask({})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert ask(bearer(predictor)).status_code == 403
        body = {"entities": {"id": ["a"]}}
        assert client.post("/api/v1/predict/m", json=body, headers=bearer(predictor)).status_code == 200
        assert client.get("/nowhere").status_code == 401
        assert client.get("/nowhere", headers=bearer(reader)).status_code == 404
        assert client.get("/metrics").status_code == 401
        assert [client.get(p).status_code for p in ("/healthz", "/readyz", "/openapi.json", "/docs")] == [200] * 4
        feast = client.post("/get-online-features", json={"entities": {"id": ["a"]}, "feature_service": "s"})
        assert feast.status_code == 401
        assert "FeastPermissionError" in feast.json()  # a JSON text, as Feast's own server answers


def test_what_exceeds_the_slots_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(concurrent=1)
    entered, leave = threading.Event(), threading.Event()
    plain = server.reader.aread

    async def slow(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        await asyncio.to_thread(leave.wait, 20)
        return await plain(*args, **kwargs)

    monkeypatch.setattr(server.reader, "aread", slow)
    answers = []
    with TestClient(server.app, raise_server_exceptions=False) as client:
        first = threading.Thread(target=lambda: answers.append(client.post("/api/v1/features/online", json=READ_BODY)))
        first.start()
        assert entered.wait(20)
        refused = client.post("/api/v1/features/online", json=READ_BODY)
        assert client.get("/healthz").status_code == 200
        leave.set()
        first.join(20)
        again = client.post("/api/v1/features/online", json=READ_BODY)

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["Retry-After"]) >= 1
    assert [answers[0].status_code, again.status_code] == [200, 200]
    assert server.gate.busy == 0


def test_a_request_over_its_time_is_a_504_and_frees_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(seconds=0.05, concurrent=1)

    async def never(*args: Any, **kwargs: Any) -> Any:
        await asyncio.Event().wait()

    plain = server.reader.aread
    with TestClient(server.app, raise_server_exceptions=False) as client:
        monkeypatch.setattr(server.reader, "aread", never)
        answer = client.post("/api/v1/features/online", json=READ_BODY)
        monkeypatch.setattr(server.reader, "aread", plain)
        again = client.post("/api/v1/features/online", json=READ_BODY)

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert again.status_code == 200
    assert server.gate.busy == 0


def test_the_command_makes_lists_and_drops_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    environment = {"PREDICTFLOW_API_KEYS_FILE": str(path)}

    def run(*args: str) -> Any:
        return CliRunner().invoke(serve_key, args, env=environment)

    made = run("new", "ci", "--scope", "read", "--scope", "write")
    assert made.exit_code == 0
    assert Keys(path).find(made.stdout.strip().encode()) is not None
    assert run("list").stdout == "ci\tread,write\n"
    assert run("new", "ci", "--scope", "read").exit_code == 2
    assert run("drop", "ci").exit_code == 0
    assert run("list").stdout == ""
    assert "PREDICTFLOW_API_KEYS_FILE" not in os.environ
