"""The Python client over gRPC: Feast's messages, and the transport of either kind. Imported on first use, with Feast."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import nan
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from feast.protos.feast.serving import GrpcServer_pb2 as feast_server
from feast.protos.feast.serving import ServingService_pb2 as feast_serving
from feast.protos.feast.types.Value_pb2 import Null, RepeatedValue, Value
from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values

from feature_store.errors import NotFoundError, PredictFlowError, UnavailableError, UsageError
from serving.client_calls import Call, Failure, To, no_answer
from serving.client_types import FeatureRow, OnlineFeatures, Pushed
from serving.client_values import require_equal_lengths

T = TypeVar("T")
Lists = Mapping[str, Sequence[object]]
"""Columns as `client_values.python_columns` makes them."""
_STATUS = {number: name for name, number in feast_serving.FieldStatus.items()}
_RETRY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
_TOO_MANY = "Concurrent RPC limit exceeded"
"""What gRPC itself says beyond the server's limit of calls; a message that is too large has the same code, and is final."""
_USAGE = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclass(frozen=True)
class GrpcCall(Generic[T]):
    """A method, the messages to send to it one after another, and how to read the answers."""

    method: str
    messages: list[bytes]
    parse: Callable[[list[bytes]], T]


class Channel:
    """Calls over one channel; blocking, or for the event loop (`asynchronous`)."""

    def __init__(
        self,
        target: str,
        timeout: float,
        api_key: str | None,
        ca_file: str | Path | None,
        secure: bool,
        asynchronous: bool,
    ) -> None:
        kind: Any = grpc.aio if asynchronous else grpc
        options = [("grpc.max_receive_message_length", -1)]
        if secure:
            roots = Path(ca_file or ssl.get_default_verify_paths().cafile or "").read_bytes() if ca_file else None
            self._channel = kind.secure_channel(target, grpc.ssl_channel_credentials(roots), options)
        else:
            self._channel = kind.insecure_channel(target, options)
        self._target = target
        self._timeout = timeout
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    def send(self, call: Call[T]) -> T | Failure:
        """The answer, or what went wrong."""
        made = self._made(call)
        try:
            return made.parse([self._one(made, message, call) for message in made.messages])
        except grpc.RpcError as e:
            return _failure(self._target, e)

    async def asend(self, call: Call[T]) -> T | Failure:
        """As `send`, on a channel for the event loop."""
        made = self._made(call)
        try:
            return made.parse([await self._one(made, message, call) for message in made.messages])
        except grpc.RpcError as e:
            return _failure(self._target, e)

    def close(self) -> Any:
        return self._channel.close()

    def _made(self, call: Call[T]) -> GrpcCall[T]:
        if call.over_grpc is None:
            raise UsageError(f"{call.what} in this form is not offered over gRPC", next_step="use the http:// URL")
        return call.over_grpc()

    def _one(self, made: GrpcCall[T], message: bytes, call: Call[T]) -> Any:
        request_id = call.headers.get("X-Request-Id")
        metadata = (*self._metadata, ("x-request-id", request_id)) if request_id else self._metadata
        return self._channel.unary_unary(made.method)(message, timeout=self._timeout, metadata=metadata)


def online_call(
    entities: Lists, feature_service: str | None, features: Sequence[str] | None, full_feature_names: bool
) -> GrpcCall[OnlineFeatures]:
    """GetOnlineFeatures. UsageError unless exactly one of the two is given."""
    if (feature_service is None) == (features is None):
        raise UsageError("give either feature_service or features")
    request = feast_serving.GetOnlineFeaturesRequest(full_feature_names=full_feature_names)
    if feature_service is not None:
        request.feature_service = feature_service
    else:
        request.features.val.extend(features or ())
    for name, values in entities.items():
        request.entities[name].CopyFrom(RepeatedValue(val=[_key(name, v) for v in values]))

    def parse(answers: list[bytes]) -> OnlineFeatures:
        answer = feast_serving.GetOnlineFeaturesResponse.FromString(answers[0])
        names = list(answer.metadata.feature_names.val)
        columns = {n: v for n, v in zip(names, answer.results) if n not in entities}
        rows = [
            FeatureRow(
                {name: values[i] for name, values in entities.items()},
                {n: _python(v.values[i]) for n, v in columns.items()},
                {n: _STATUS[v.statuses[i]] for n, v in columns.items()},
                {n: _time(v.event_timestamps[i]) for n, v in columns.items()},
            )
            for i in range(len(next(iter(entities.values()))))
        ]
        types = [_type(v.values) for v in columns.values()]
        return OnlineFeatures(None, feature_service, list(columns), rows, types)

    return GrpcCall("/feast.serving.ServingService/GetOnlineFeatures", [request.SerializeToString()], parse)


def push_call(columns: Lists, feature_view: str | None, push_source: str | None, to: To) -> GrpcCall[Pushed]:
    """Push, or WriteToOnlineStore for a view: one message per row, as Feast's service takes them."""
    if (feature_view is None) == (push_source is None):
        raise UsageError("give either feature_view or push_source")
    if feature_view is not None and to != "online":
        raise UsageError(
            "over gRPC a view is written online only",
            value=to,
            valid=["online"],
            next_step='pass to="online", or name its push_source',
        )
    require_equal_lengths(columns)
    typed = {name: _sent(name, values) for name, values in columns.items()}
    messages = []
    for values in zip(*typed.values()):
        row = dict(zip(typed, values))
        made: Any
        if push_source is not None:
            made = feast_server.PushRequest(stream_feature_view=push_source, typed_features=row, to=to)
        elif feature_view is not None:
            made = feast_server.WriteToOnlineStoreRequest(feature_view_name=feature_view, typed_features=row)
        messages.append(made.SerializeToString())
    method = "Push" if push_source is not None else "WriteToOnlineStore"
    return GrpcCall(f"/GrpcFeatureServer/{method}", messages, lambda answers: Pushed(len(answers), [], to))


def _key(name: str, value: object) -> Value:
    match value:
        case None:
            return Value(null_val=Null.NULL)
        case bool():
            return Value(bool_val=value)
        case int() if -(2**63) <= value < 2**63:
            return Value(int64_val=value)
        case str():
            return Value(string_val=value)
        case float():  # no join key is one; on-demand views take them
            return Value(double_val=value)
        case bytes():
            return Value(bytes_val=value)
    raise UsageError(f"join key {name}: not a text, number of 64 bits, boolean or bytes", value=value)


def _sent(name: str, values: Sequence[object]) -> list[Value]:
    """A column as Values. What Feast's conversion would lose goes around it: NaN, which it makes a null, and the
    microseconds of times, which the server reads from a text."""
    try:
        made = python_values_to_proto_values([_text_or_same(v) for v in values])
    except (TypeError, ValueError, OverflowError) as e:
        types = sorted({type(v).__name__ for v in values if v is not None})
        raise UsageError(
            f"column {name}: values that cannot be sent over gRPC",
            value=types,
            next_step="give the column one type, or use the http:// URL",
        ) from e
    return [
        sent if sent.WhichOneof("val") else Value(double_val=nan) if v != v else Value(null_val=Null.NULL)
        for v, sent in zip(values, made)
    ]


def _text_or_same(value: object) -> object:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()
    return None if value != value else value


def _python(value: Value) -> Any:
    kind = value.WhichOneof("val")
    return None if kind in (None, "null_val") else feast_value_type_to_python_type(value)


def _type(column: Iterable[Value]) -> str:
    """The name of the Feast value type of a column; empty where it holds no value."""
    for value in column:
        kind = value.WhichOneof("val")
        if kind not in (None, "null_val"):
            name = str(kind).removesuffix("_val").upper()
            return f"VALUE_{name}" if name in ("LIST", "SET") else name
    return ""


def _time(timestamp: Any) -> datetime | None:
    if not timestamp.seconds and not timestamp.nanos:
        return None
    return datetime.fromtimestamp(timestamp.seconds, tz=UTC).replace(microsecond=timestamp.nanos // 1000)


def _failure(target: str, error: Any) -> Failure:
    code, said = error.code(), error.details() or ""
    trailing = dict(error.trailing_metadata() or ())
    ours = trailing.get("x-error-code")
    if ours is None and code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return no_answer(target, TimeoutError() if code == grpc.StatusCode.DEADLINE_EXCEEDED else ConnectionError())
    kind: type[PredictFlowError] = PredictFlowError
    if code == grpc.StatusCode.NOT_FOUND:
        kind = NotFoundError
    elif code in _USAGE:
        kind = UsageError
    elif code in _RETRY and ("retry-after" in trailing or (ours is None and _TOO_MANY in said)):
        kind = UnavailableError
    fault = kind(said)
    fault.code = str(ours or code.name.lower())
    wait = str(trailing.get("retry-after", ""))
    return Failure(fault, float(wait) if wait.isdigit() else 0.0)
