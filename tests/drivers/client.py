"""An MCP client as agents are: starts servers over stdio and calls one tool of each.

    client.py CALLS      CALLS: a JSON list of {"name", "command": [...], "tool", "arguments"}

The servers run at the same time. Prints one JSON object per call:
{"name", "ok", "text"}; `ok` is false for a tool error and for a failed server.
"""

import asyncio
import json
import os
import sys

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

# A server that does not answer is an answer, too.
LIMIT_SECONDS = 25


async def call(spec, ready, go):
    command, *args = spec["command"]
    server = StdioServerParameters(command=command, args=args, env=dict(os.environ))
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        ready.release()
        # All servers are up before the first is asked.
        await go.wait()
        result = await session.call_tool(spec["tool"], spec["arguments"])
        text = "\n".join(c.text for c in result.content if c.type == "text")
        return {"name": spec["name"], "ok": not result.is_error, "text": text}


async def guarded(spec, ready, go):
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            return await call(spec, ready, go)
    except BaseException as error:  # an exception group of the SDK's task groups
        ready.release()
        return {"name": spec["name"], "ok": False, "text": repr(error)}


async def main():
    specs = json.loads(sys.argv[1])
    ready, go = asyncio.Semaphore(0), asyncio.Event()
    tasks = [asyncio.create_task(guarded(spec, ready, go)) for spec in specs]
    for _ in specs:
        await ready.acquire()
    go.set()
    for task in tasks:
        print(json.dumps(await task), flush=True)


asyncio.run(main())
