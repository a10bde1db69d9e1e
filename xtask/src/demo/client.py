"""An MCP client that holds several servers, as an agent does.

argv[1]: {"name": {"command": ..., "args": [...]}}. Then one call a line on
stdin, {"server": ..., "tool": ..., "arguments": {...}}; each is answered by one
line, {"error": bool, "text": ...}. The first line of output lists the tools.
"""

import asyncio
import contextlib
import json
import sys

from mcp import StdioServerParameters
from mcp.client import Client


def say(answer):
    print(json.dumps(answer), flush=True)


async def main():
    declared = json.loads(sys.argv[1])
    async with contextlib.AsyncExitStack() as stack:
        servers, tools = {}, {}
        for name, server in declared.items():
            client = Client(StdioServerParameters(**server))
            servers[name] = await stack.enter_async_context(client)
            tools[name] = [tool.name for tool in (await servers[name].list_tools()).tools]
        say(tools)
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            call = json.loads(line)
            try:
                result = await servers[call["server"]].call_tool(call["tool"], call["arguments"])
                text = " ".join(getattr(part, "text", "") for part in result.content)
                say({"error": bool(result.is_error), "text": text})
            except Exception as error:
                say({"error": True, "text": f"{type(error).__name__}: {error}"})


asyncio.run(main())
