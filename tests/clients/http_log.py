"""An HTTP client for the Python SDK that keeps a log of what it sends and receives."""

import json

httpx = log = described = Transport = Body = None


class Messages:
    """The messages in a response: JSON, or the events of a stream (WHATWG HTML section 9.2)."""

    def __init__(self, kind):
        self.events = kind.startswith("text/event-stream")
        self.rest, self.data, self.event, self.count = b"", [], b"", 0

    def take(self, piece):
        self.count += len(piece)
        self.rest += piece
        if self.events:
            *lines, self.rest = self.rest.split(b"\n")
            for line in lines:
                self.line(line.removesuffix(b"\r"))

    def line(self, line):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self.data.append(value)
        elif name == b"event":
            self.event = value
        elif not line:
            if self.event in (b"", b"message"):
                received(b"\n".join(self.data))
            self.data, self.event = [], b""

    def end(self):
        if not self.events:
            received(self.rest)


def message(way, text):
    try:
        read = json.loads(text)
    except ValueError:
        return
    log(process=0, way=way, bytes=len(text), **described(read))


def received(text):
    if text:
        message("received", text)


def prepare(modern, log_, described_):
    global httpx, log, described, Transport, Body
    log, described = log_, described_
    import importlib

    httpx = importlib.import_module("httpx2" if modern else "httpx")

    class Body(httpx.AsyncByteStream):
        def __init__(self, inner, exchange, kind):
            self.inner, self.exchange, self.messages = inner, exchange, Messages(kind)

        async def __aiter__(self):
            async for piece in self.inner:
                self.messages.take(piece)
                yield piece
            self.messages.end()
            log(ended={**self.exchange, "received": self.messages.count})

        async def aclose(self):
            await self.inner.aclose()

    class Transport(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request):
            text = await request.aread()
            if text:
                message("sent", text)
            log(asked={"method": request.method, "sent": len(text)})
            response = await super().handle_async_request(request)
            exchange = {"method": request.method, "status": response.status_code, "sent": len(text)}
            log(began=exchange, named="mcp-session-id" in response.headers)
            kind = response.headers.get("content-type", "")
            body = Body(response.stream, exchange, kind)
            return httpx.Response(
                response.status_code, headers=response.headers, stream=body, extensions=response.extensions
            )


def client(headers=None, timeout=None, auth=None):
    timeout = timeout or httpx.Timeout(30, read=300)
    return httpx.AsyncClient(headers=headers, timeout=timeout, auth=auth, transport=Transport())
