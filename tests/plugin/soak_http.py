"""HTTP by hand, for what no client library sends: broken requests, and connections that end in the middle of an answer."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from typing import Any
from urllib.parse import urlsplit

from metrics import sums
from soak_bad import Bad


class Address:
    """Where the server is. url: http://host:port."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise ValueError(f"the server is {url!r}, expected http://HOST:PORT")
        self.host, self.port = parts.hostname, parts.port

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    async def send(self, bad: Bad) -> tuple[int | None, bytes]:
        """(status, body); status None where the server closes without an answer."""
        reader, writer = await self.connect()
        try:
            head = {**dict(bad.headers), "Host": f"{self.host}:{self.port}", "Connection": "close", "Content-Length": str(len(bad.body))}
            request = f"{bad.method} {bad.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in head.items())
            writer.write(bad.raw if bad.raw is not None else request.encode() + b"\r\n" + bad.body)
            await writer.drain()
            answer = await reader.read()
        finally:
            writer.close()
        line, _, rest = answer.partition(b"\r\n")
        words = line.split()
        status = int(words[1]) if len(words) > 1 and words[1].isdigit() else None
        return status, rest.partition(b"\r\n\r\n")[2]

    async def abandon(self, path: str, body: dict[str, Any], draw: random.Random) -> None:
        """Ask and leave: at once, in the middle of the request, or after some of the answer; politely or with a reset."""
        reader, writer = await self.connect()
        try:
            content = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            whole = head.encode() + content
            how = draw.choice(["half", "at once", "some", "some", "some"])
            writer.write(whole[: len(whole) - len(content) // 2] if how == "half" else whole)
            await writer.drain()
            if how == "some":
                async with asyncio.timeout(60):
                    for _ in range(draw.randrange(30)):
                        if not await reader.read(4096):
                            break
            if draw.random() < 0.5:
                linger = struct.pack("ii", 1, 0)  # closing then sends a reset
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        finally:
            writer.close()

    async def call(self, method: str, path: str, timeout: float = 60) -> tuple[int | None, bytes]:
        """(status, body) of a call without a body."""
        async with asyncio.timeout(timeout):
            return await self.send(Bad(path, path, b"", method=method))

    async def metrics(self) -> dict[str, float]:
        """Sums of the server's counters and gauges by name, over their labels."""
        _, body = await self.call("GET", "/metrics")
        return sums(dechunked(body).decode())


def dechunked(body: bytes) -> bytes:
    """A body as it is, or put together where it came in chunks."""
    out, rest = b"", body
    while True:
        line, end, after = rest.partition(b"\r\n")
        try:
            size = int(line, 16)
        except ValueError:
            return out or body
        if not end or not size:
            return out
        out, rest = out + after[:size], after[size + 2 :]
