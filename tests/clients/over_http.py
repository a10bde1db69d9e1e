"""An MCP client over HTTP on the Python SDK, 1.x or 2.x as its environment has it.

    over_http.py streamable|sse URL [IP PORT]     lists the tools; with IP and PORT, calls `connect`

Says what came of it in one line.
"""

import asyncio
import sys

import mcp

KIND, URL, *TO = sys.argv[1:]


async def use(session):
    tools = (await session.list_tools()).tools
    if TO:
        result = await session.call_tool("connect", {"to": TO[0], "port": int(TO[1])})
        print("connect:", result.content[0].text)
    print("listed", len(tools))


async def over(streams):
    async with streams as (read, write, *_), mcp.ClientSession(read, write) as session:
        await session.initialize()
        await use(session)


async def main():
    from mcp.client.sse import sse_client
    from mcp.client.streamable_http import streamable_http_client

    if KIND == "sse":
        await over(sse_client(URL))
    elif hasattr(mcp, "Client"):
        async with mcp.Client(URL) as client:
            await use(client)
    else:
        await over(streamable_http_client(URL))


asyncio.run(main())
