"""A real HTTP server on this machine that speaks enough of OpenAI's protocol for `langchain_openai`.

Chat completions (plain, streamed, tools, `response_format`) and embeddings. OpenAI's Responses API is not spoken:
`ChatOpenAI(use_responses_api=False)` keeps models off it that would prefer it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Event, Lock, Thread
from typing import Any, cast

from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_messages, convert_to_openai_messages
from langchain_core.messages.ai import UsageMetadata
from pydantic import BaseModel

from agent.errors import ConfigurationError
from agent.testing.scripted_chat import as_message, in_chunks, resolve

_CREATED = 1_760_000_000
"""The moment, in epoch seconds, that every answer bears."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An HTTP error, such as 401, 429 or 500, in OpenAI's form."""

    status: int
    message: str = "refused by the script"
    retry_after: timedelta | None = None
    """Sent as the header `retry-after`; `None` sends none."""


@dataclass(frozen=True)
class Hang:
    """The request is taken and never answered; the client's own time-out must end it."""


@dataclass(frozen=True)
class CutOff:
    """Half of the answer's body, then the connection is closed."""

    answer: Any = "This answer is long enough to be cut off in the middle."


@dataclass(frozen=True)
class Slow:
    """The answer, or the fault, after a while."""

    delay: timedelta
    answer: Any = "At last."


@dataclass(frozen=True, kw_only=True)
class RecordedRequest:
    """One request as it came in."""

    path: str
    body: dict[str, Any]
    api_key: str
    """The bearer token; empty text: none was sent."""


class OpenAIServer:
    """The running server; made by `openai_server`."""

    def __init__(
        self,
        script: Sequence[Any],
        *,
        embedding_faults: Sequence[Any],
        dimensions: int,
        api_key: str | None,
        delay: timedelta,
    ) -> None:
        if not script:
            raise ConfigurationError("script=[] has nothing to answer; give at least one item")
        for position, item in enumerate(script):
            _check_server_item(item, f"script[{position}]")
        if dimensions < 1:
            raise ConfigurationError(f"dimensions={dimensions!r} must be at least 1")
        self._script = list(script)
        self._embedding_faults = list(embedding_faults)
        self._dimensions = dimensions
        self._api_key = api_key
        self._delay = delay
        self._lock = Lock()
        self._requests: list[RecordedRequest] = []
        self._closing = Event()
        self._http = _LoopbackServer(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """What `base_url` or `OPENAI_BASE_URL` wants: `http://127.0.0.1:<port>/v1`."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def requests(self) -> list[RecordedRequest]:
        """Every request so far, refused ones too, oldest first."""
        with self._lock:
            return list(self._requests)

    @property
    def chat_requests(self) -> list[RecordedRequest]:
        """The requests for an answer."""
        return [request for request in self.requests if request.path == "/v1/chat/completions"]

    @property
    def embedding_requests(self) -> list[RecordedRequest]:
        """The requests for vectors."""
        return [request for request in self.requests if request.path == "/v1/embeddings"]

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """End every wait and hang, then stop; all threads are gone afterwards."""
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def reply(self, request: RecordedRequest) -> _Reply:
        """Record the request, and decide what to send."""
        with self._lock:
            number = sum(earlier.path == request.path for earlier in self._requests)
            self._requests.append(request)
        if self._api_key is not None and request.api_key != self._api_key:
            return _refuse(
                Refusal(status=401, message=f"Incorrect API key provided: {request.api_key[:3]}***.")
            )
        if request.path == "/v1/chat/completions":
            item = self._script[min(number, len(self._script) - 1)]
            return self._act(request, item)
        if request.path == "/v1/embeddings":
            fault = self._embedding_faults[number] if number < len(self._embedding_faults) else None
            return self._act(request, fault)
        return _refuse(
            Refusal(
                status=404, message=f"{request.path} is not spoken here, only chat completions and embeddings"
            )
        )

    def _act(self, request: RecordedRequest, item: Any) -> _Reply:
        self._closing.wait(self._delay.total_seconds())
        fraction = 1.0
        while True:
            item = resolve(item, request.body, check=_check_server_item)
            match item:
                case Slow(delay=delay, answer=answer):
                    self._closing.wait(delay.total_seconds())
                    item = answer
                case CutOff(answer=answer):
                    fraction = 0.5
                    item = None if request.path == "/v1/embeddings" else answer
                case Hang():
                    self._closing.wait()
                    return _Reply(status=0, parts=(), kind="", fraction=0)
                case Refusal():
                    return _refuse(item)
                case _:
                    break
        if request.path == "/v1/embeddings":
            reply = _vectors(request.body, self._dimensions)
        else:
            reply = _completion(request.body, item)
        return reply if fraction == 1.0 else _Reply(reply.status, reply.parts, reply.kind, fraction)


@contextmanager
def openai_server(
    script: Sequence[Any] = ("Hello from the test server.",),
    *,
    embedding_faults: Sequence[Any] = (),
    dimensions: int = 1536,
    api_key: str | None = None,
    delay: timedelta = timedelta(0),
) -> Iterator[OpenAIServer]:
    """Run the server on a free port of 127.0.0.1 until the block ends.

    Args:
        script: One item a chat request, the last one repeats: text, `AIMessage`, a Pydantic object (JSON text, or the
            tool call of its class where tools are bound and no `response_format` is), `Refusal`, `Hang`, `CutOff`,
            `Slow`, or a function of the request's body that gives one of these.
        embedding_faults: The n-th embedding request meets the n-th fault; `None`, and all after the last, work.
        dimensions: Length of the vectors, unless a request asks for another. They are deterministic, of length one,
            and texts that share words are near each other.
        api_key: The only key that is taken; `None` takes any.
        delay: Wait before each answer.
    """
    server = OpenAIServer(
        script, embedding_faults=embedding_faults, dimensions=dimensions, api_key=api_key, delay=delay
    )
    server.start()
    try:
        yield server
    finally:
        server.close()


@dataclass(frozen=True)
class _Reply:
    status: int
    """HTTP status; 0 closes the connection without a word."""
    parts: tuple[bytes, ...]
    """One part: a body of known length. More: a stream of chunks."""
    kind: str
    fraction: float = 1.0
    """How much of the body is sent before the connection is cut."""
    headers: Mapping[str, str] | None = None


class _LoopbackServer(ThreadingHTTPServer):
    daemon_threads = False  # they are joined at the end: no request outlives the block it was made in
    request_queue_size = 128  # with fewer, a burst of tests' requests waits a second each for a new try

    def server_bind(self) -> None:
        """Without the look-up of the host's name, which takes seconds where no name server answers."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: OpenAIServer, *args: Any) -> None:
        self._openai = server
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        """Requests are recorded; the test's output stays clean."""

    def do_GET(self) -> None:
        self._send(_refuse(Refusal(status=405, message=f"GET {self.path} is not spoken here")))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            reply = self._openai.reply(
                RecordedRequest(
                    path=self.path.partition("?")[0],
                    body=_object(body),
                    api_key=(self.headers.get("authorization") or "").removeprefix("Bearer ").strip(),
                )
            )
        except _BadRequest as error:
            reply = _refuse(Refusal(status=400, message=str(error)))
        except Exception as error:  # noqa: BLE001 - a script's function failed: its test shall see why
            reply = _refuse(Refusal(status=500, message=f"the script failed: {error!r}"))
        try:
            self._send(reply)
        except ConnectionError:
            self.close_connection = True  # the client has gone, which is its right

    def _send(self, reply: _Reply) -> None:
        # One request a connection, so that the end of the block waits for no idle client.
        self.close_connection = True
        if reply.status == 0:
            return
        self.send_response(reply.status)
        for name, value in {
            "content-type": reply.kind,
            "connection": "close",
            **(reply.headers or {}),
        }.items():
            self.send_header(name, value)
        if len(reply.parts) == 1:
            body = reply.parts[0]
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: int(len(body) * reply.fraction)])
            return
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in reply.parts[: int(len(reply.parts) * reply.fraction)]:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        if reply.fraction == 1.0:
            self.wfile.write(b"0\r\n\r\n")


class _BadRequest(Exception):
    """The request breaks the protocol; OpenAI would answer 400."""


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        raise _BadRequest("the body is not JSON") from None
    if not isinstance(value, dict):
        raise _BadRequest("the body is not a JSON object")
    return value


def _refuse(refusal: Refusal) -> _Reply:
    kinds = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}
    body = {
        "error": {
            "message": refusal.message,
            "type": kinds.get(
                refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error"
            ),
            "param": None,
            "code": HTTPStatus(refusal.status).phrase.lower().replace(" ", "_"),
        }
    }
    headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after.total_seconds())}
    return _Reply(refusal.status, (json.dumps(body).encode(),), "application/json", headers=headers)


def _completion(request: dict[str, Any], answer: Any) -> _Reply:
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _BadRequest("messages must be a list with at least one message")
    _check_tool_calls_are_answered(messages)
    _check_tool_choice(request)
    has_tools = bool(request.get("tools")) and "response_format" not in request
    message = as_message(answer, convert_to_messages(messages), has_tools=has_tools)
    model = request.get("model", "")
    usage = _openai_usage(message)
    reason = "tool_calls" if message.tool_calls else "stop"
    if not request.get("stream"):
        body = {
            "id": "chatcmpl-test",
            "object": "chat.completion",
            "created": _CREATED,
            "model": model,
            "choices": [
                {"index": 0, "message": _openai_message(message), "finish_reason": reason, "logprobs": None}
            ],
            "usage": usage,
        }
        return _Reply(200, (json.dumps(body).encode(),), "application/json")
    chunk = {"id": "chatcmpl-test", "object": "chat.completion.chunk", "created": _CREATED, "model": model}
    events: list[dict[str, Any]] = [
        {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in _deltas(message)
    ]
    events.append({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if (request.get("stream_options") or {}).get("include_usage"):
        events.append({**chunk, "choices": [], "usage": usage})
    parts = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    return _Reply(200, (*parts, b"data: [DONE]\n\n"), "text/event-stream")


def _openai_message(message: AIMessage) -> dict[str, Any]:
    body = convert_to_openai_messages(message)
    return {**body, "content": body.get("content") or None, "refusal": None}


def _deltas(message: AIMessage) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": ""}
    for generation in in_chunks(message):
        chunk = cast("AIMessageChunk", generation.message)
        if chunk.text:
            yield {"content": chunk.text}
        for call in chunk.tool_call_chunks:
            function = {"name": call["name"], "arguments": call["args"]}
            yield {
                "tool_calls": [
                    {"index": call["index"], "id": call["id"], "type": "function", "function": function}
                ]
            }


def _openai_usage(message: AIMessage) -> dict[str, int]:
    usage = message.usage_metadata or UsageMetadata(input_tokens=0, output_tokens=0, total_tokens=0)
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["total_tokens"],
    }


def _check_tool_calls_are_answered(messages: list[dict[str, Any]]) -> None:
    """As OpenAI does: each tool call is answered right after the message that made it."""
    waiting: set[str] = set()
    for position, message in enumerate(messages):
        if message.get("role") == "tool":
            if message.get("tool_call_id") not in waiting:
                raise _BadRequest(
                    f"messages[{position}]: role 'tool' must answer a preceding message with 'tool_calls'"
                )
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            break
        waiting = {call["id"] for call in message.get("tool_calls") or ()}
    if waiting:
        raise _BadRequest(
            "an assistant message with 'tool_calls' must be followed by tool messages responding to each "
            f"'tool_call_id'; without an answer: {', '.join(sorted(waiting))}"
        )


def _check_tool_choice(request: dict[str, Any]) -> None:
    choice = request.get("tool_choice")
    names = [tool.get("function", {}).get("name") for tool in request.get("tools") or ()]
    if choice and not names and choice != "none":
        raise _BadRequest("'tool_choice' is only allowed when 'tools' are specified")
    if isinstance(choice, dict) and choice.get("function", {}).get("name") not in names:
        raise _BadRequest(f"'tool_choice' names a tool that is not in 'tools': {choice!r}")


def _vectors(request: dict[str, Any], dimensions: int) -> _Reply:
    given = request.get("input")
    texts = (
        [given]
        if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int))
        else given
    )
    if not isinstance(texts, list) or not texts or not all(texts):
        raise _BadRequest("'input' must be text, a list of texts or of token lists, and none of them empty")
    length = request.get("dimensions") or dimensions
    vectors = [_vector(text, length) for text in texts]
    encode = _base64 if request.get("encoding_format") == "base64" else list
    tokens = sum(len(text) for text in texts)
    body = {
        "object": "list",
        "model": request.get("model", ""),
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return _Reply(200, (json.dumps(body).encode(),), "application/json")


def _vector(text: str | list[int], dimensions: int) -> list[float]:
    """Each word (or token) adds one to a place that its hash picks."""
    words = (
        re.findall(r"\w+", text.lower()) or [text]
        if isinstance(text, str)
        else [str(token) for token in text]
    )
    vector = [0.0] * dimensions
    for word in words:
        vector[int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest()) % dimensions] += 1.0
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector]


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _check_server_item(item: Any, place: str) -> None:
    if isinstance(item, Refusal | Hang | CutOff | Slow):
        return
    if isinstance(item, Exception) or (isinstance(item, type) and issubclass(item, Exception)):
        raise ConfigurationError(f"{place}={item!r} cannot travel over HTTP; use Refusal(status=500)")
    if not isinstance(item, str | AIMessage | BaseModel) and not callable(item):
        raise ConfigurationError(
            f"{place}={item!r} cannot be answered; use text, an AIMessage, a Pydantic object, Refusal, Hang, CutOff, "
            "Slow, or a function of the request's body"
        )
