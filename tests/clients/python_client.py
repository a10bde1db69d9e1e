"""An MCP client on the Python SDK, 1.x or 2.x as its environment has it, that keeps a log of its wire.

    python_client.py SESSION      SESSION: a JSON file, see tests/src/mcp/session.rs

The log is what this client itself put on and took off the server's stdio, or its HTTP connections:
for each message its length without what frames it, and the ids, names and outcomes it held. Beside it
stands what the SDK told its caller of each call.
"""

import asyncio
import json
import os
import sys

import anyio
import mcp
from mcp import StdioServerParameters

MODERN_SDK = hasattr(mcp, "Client")
if MODERN_SDK:
    import mcp_types as types
    from mcp import Client, MCPError
else:
    from mcp import ClientSession, types
    from mcp.client.stdio import stdio_client
    from mcp.shared.exceptions import McpError as MCPError

with open(sys.argv[1]) as f:
    SESSION = json.load(f)
LOG = open(SESSION["log"], "w")


def log(**record):
    LOG.write(json.dumps(record) + "\n")


def described(message):
    if not isinstance(message, dict):
        return {}
    kept = {k: message[k] for k in ("id", "method") if k in message}
    params, result, error = (message.get(k) or {} for k in ("params", "result", "error"))
    kept.update({k: params[k] for k in ("name", "uri", "requestId") if k in params})
    version = (params.get("_meta") or {}).get("io.modelcontextprotocol/protocolVersion")
    if version:
        kept["version"] = version
    if error:
        kept["error"] = error["code"]
    elif "result" in message:
        kept["result"] = {k: result[k] for k in ("isError", "resultType", "protocolVersion") if k in result}
    return kept


class Lines:
    def __init__(self, process, way):
        self.process, self.way, self.rest = process, way, []

    def take(self, data):
        *ended, rest = data.split(b"\n")
        for piece in ended:
            line = b"".join([*self.rest, piece])
            self.rest = []
            log(process=self.process, way=self.way, bytes=len(line), **described(json.loads(line)))
        if rest:
            self.rest.append(rest)


class Tapped:
    """One end of a server's stdio, with a `Lines` beside it."""

    def __init__(self, stream, lines):
        self.stream, self.lines = stream, lines

    async def send(self, data):
        self.lines.take(data)
        await self.stream.send(data)

    async def receive(self, *args):
        data = await self.stream.receive(*args)
        self.lines.take(data)
        return data

    def __getattr__(self, name):
        return getattr(self.stream, name)


open_process = anyio.open_process


async def tapped_process(*args, **kwargs):
    process = await open_process(*args, **kwargs)
    process._stdin = Tapped(process._stdin, Lines(process.pid, "sent"))
    process._stdout = Tapped(process._stdout, Lines(process.pid, "received"))
    return process


anyio.open_process = tapped_process

if SESSION.get("url"):
    import http_log

    http_log.prepare(MODERN_SDK, log, described)


async def sampling(context, params):
    content = types.TextContent(type="text", text="five")
    return types.CreateMessageResult(role="assistant", content=content, model="none")


async def elicitation(context, params):
    return types.ElicitResult(action="accept", content={})


async def roots(context):
    return types.ListRootsResult(roots=[])


async def progress(done, total, message):
    pass


def is_error(result):
    return result.is_error if MODERN_SDK else result.isError


async def call(session, todo):
    """Says what came of it in the sensor's words."""
    more = {"progress_callback": progress} if todo.get("progress") else {}
    try:
        if "cancel_after" in todo:
            return await cancelled_call(session, todo)
        result = await session.call_tool(todo["tool"], todo.get("arguments", {}), **more)
        return "tool_error" if is_error(result) else "ok"
    except MCPError as error:
        return f"rpc_error {error.error.code}"


async def cancelled_call(session, todo):
    if not MODERN_SDK:
        number = session._request_id
    with anyio.move_on_after(todo["cancel_after"]) as scope:
        await session.call_tool(todo["tool"], todo.get("arguments", {}))
    if not scope.cancelled_caught:
        return "ok"
    if not MODERN_SDK:
        # The 1.x SDK leaves it to its caller to say so.
        told = types.CancelledNotification(
            method="notifications/cancelled", params=types.CancelledNotificationParams(requestId=number)
        )
        await session.send_notification(types.ClientNotification(told))
    return "cancelled"


async def act(session, todo):
    what = todo.get("do", "call")
    if what == "call":
        log(call=todo["tool"], outcome=await call(session, todo))
    elif what == "tools":
        await session.list_tools()
    elif what == "prompt":
        await session.get_prompt(todo["name"], todo.get("arguments"))
    elif what == "resource":
        await session.read_resource(todo["uri"])
    elif what == "wait":
        while not os.path.exists(todo["file"]):
            await anyio.sleep(0.01)
    else:
        raise ValueError(f"do {what}?")


async def phase(session, todos, concurrency):
    limit = asyncio.Semaphore(concurrency)

    async def one(todo):
        async with limit:
            await act(session, todo)

    async with asyncio.TaskGroup() as group:
        for todo in todos:
            for _ in range(todo.get("times", 1)):
                group.create_task(one(todo))


async def all_phases(session):
    for step in SESSION["phases"]:
        await phase(session, step["calls"], step.get("concurrency", 1))


def over_http():
    """The transport to a server that listens already."""
    if SESSION["transport"] == "sse":
        from mcp.client.sse import sse_client

        return sse_client(SESSION["url"], httpx_client_factory=http_log.client)
    from mcp.client.streamable_http import streamable_http_client

    return streamable_http_client(SESSION["url"], http_client=http_log.client())


def started():
    command, *args = SESSION["command"]
    env = {**os.environ, **SESSION.get("env", {})}
    return StdioServerParameters(command=command, args=args, env=env, cwd=SESSION.get("cwd"))


async def main():
    handlers = {
        "sampling_callback": sampling,
        "elicitation_callback": elicitation,
        "list_roots_callback": roots,
    }
    listens = SESSION.get("url")
    if MODERN_SDK:
        async with Client(over_http() if listens else started(), mode=SESSION["mode"], **handlers) as client:
            await all_phases(client)
    else:
        transport = over_http() if listens else stdio_client(started())
        async with transport as (read, write, *_), ClientSession(read, write, **handlers) as session:
            await session.initialize()
            await all_phases(session)


if SESSION.get("uvloop"):
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
LOG.close()
