"""A light client of an OpenAI-compatible server, in a process of its own: streams answers and notes when each part of them came.

    python serve_client.py

stdin takes one JSON object per line, {"port", "path", "bodies": [..]}: all bodies are posted at once to 127.0.0.1, each on a connection
of its own that is open before the clock starts. stdout answers with a line, {"seconds", "streams": [{"first_s", "last_s", "gaps_s": [..],
"tokens"} ..]}, or {"error"}. seconds: from the first byte sent to the last event of all. first_s: from there to the first event of a
stream with a piece of the answer, last_s to its last one; gaps_s are the times between the pieces. tokens: what the server counted.

It shares the machine's cores with the server, so while answers come it only keeps bytes and times; they are read when all is over.
Standard library alone; run as a file.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from functools import partial
from typing import Any

END = b"data: [DONE]"
BLANK = b"\n\n"


class ClientError(RuntimeError):
    """The server refused, or what it sent is no stream of events."""


class Stream(asyncio.Protocol):
    """One request and the bytes of its answer. chunks: (seconds of perf_counter, bytes)."""

    def __init__(self, request: bytes):
        self.request = request
        self.chunks: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self) -> None:
        assert self._transport is not None
        self._transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.chunks.append((time.perf_counter(), data))
        self._tail = (self._tail + data)[-32:]
        if END in self._tail:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def request_bytes(port: int, path: str, body: dict[str, Any]) -> bytes:
    """An HTTP/1.1 POST."""
    content = json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",  # a refusal ends with the connection; kept alive it would end seconds later
    ]
    return "\r\n".join([*head, "", ""]).encode() + content


async def post_all(port: int, path: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Post `bodies` at once and read all streams to their ends; see the module's docstring. Raises: ClientError, OSError."""
    loop = asyncio.get_running_loop()
    streams = []
    try:
        for body in bodies:
            _, stream = await loop.create_connection(partial(Stream, request_bytes(port, path, body)), "127.0.0.1", port)
            streams.append(stream)
        started = time.perf_counter()
        for stream in streams:
            stream.send()
        for stream in streams:
            await stream.ended
    finally:
        for stream in streams:
            stream.close()
    times = [timeline(stream.chunks, started) for stream in streams]
    return {"seconds": max(found["last_s"] for found in times), "streams": times}


def timeline(chunks: list[tuple[float, bytes]], started: float) -> dict[str, Any]:
    """first_s, last_s, gaps_s and tokens of one stream. started: the clock's zero. Raises: ClientError."""
    arrivals, payload = dechunked(chunks)
    times, tokens, done = [], None, False
    at = 0
    while (end := payload.find(BLANK, at)) >= 0:
        event, at = payload[at:end], end + len(BLANK)
        if not event.startswith(b"data: "):
            continue  # a comment that keeps the connection alive
        if event == END:
            done = True
            break
        data = json.loads(event[len(b"data: ") :])
        if "error" in data:
            raise ClientError(f"the server ended a stream with {data['error']}")
        if usage := data.get("usage"):
            tokens = usage["completion_tokens"]
        if any(is_piece(choice) for choice in data["choices"]):
            times.append(arrival(arrivals, end) - started)
    if not done or not times or tokens is None:
        raise ClientError(f"a stream ended early, after {len(times)} pieces; its last bytes are {payload[-200:]!r}")
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return {"first_s": times[0], "last_s": times[-1], "gaps_s": gaps, "tokens": tokens}


def is_piece(choice: dict[str, Any]) -> bool:
    """Whether it brings a part of the answer. A chat's first event names the role and has none."""
    if "delta" in choice:
        return "role" not in choice["delta"]
    return True


def dechunked(chunks: list[tuple[float, bytes]]) -> tuple[list[tuple[int, float]], bytes]:
    """The body of a chunked answer, and for each piece received how many bytes of the body were there by then, with the time.

    Raises: ClientError for another status than 200 or another encoding.
    """
    raw = b"".join(data for _, data in chunks)
    head, blank, _ = raw.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].decode(errors="replace")
    if not blank or " 200" not in status:
        raise ClientError(f"the server answered {status or 'nothing'}: {raw[len(head) + 4 :][:500].decode(errors='replace').strip()}")
    if b"chunked" not in head.lower():
        raise ClientError(f"the answer is not streamed in chunks, its head is {head!r:.300}")
    received = list(itertools.accumulate(len(data) for _, data in chunks))
    body = bytearray()
    ends = []  # (bytes of raw, bytes of body) behind each chunk
    at = len(head) + 4
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:line_end], 16)
        begin = line_end + 2
        body += raw[begin : begin + size]
        at = begin + size + 2
        ends.append((begin + size, len(body)))
        if not size:
            break
    arrivals = []
    position = iter(ends)
    upcoming = next(position, None)
    there = 0
    for (when, _), total in zip(chunks, received, strict=True):
        while upcoming is not None and upcoming[0] <= total:
            there = upcoming[1]
            upcoming = next(position, None)
        arrivals.append((there, when))
    return arrivals, bytes(body)


def arrival(arrivals: list[tuple[int, float]], position: int) -> float:
    """When byte `position` of the body was there: the time of the first piece that reaches it."""
    low, high = 0, len(arrivals) - 1
    while low < high:
        middle = (low + high) // 2
        if arrivals[middle][0] > position:
            high = middle
        else:
            low = middle + 1
    return arrivals[low][1]


def main() -> None:
    for line in sys.stdin:
        try:
            answer = asyncio.run(post_all(**json.loads(line)))
        except (ClientError, OSError, ValueError, KeyError) as error:  # becomes the parent's error
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
