"""A server on the Python SDK, 1.x or 2.x as its environment has it, that listens on PORT.

    listens.py [--stateless] [--json]      without sessions; answers as JSON, not as event streams
"""

import os
import sys

PORT = int(os.environ["PORT"])
how = {"stateless_http": "--stateless" in sys.argv, "json_response": "--json" in sys.argv}

try:
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("listens")
    run = {"host": "127.0.0.1", "port": PORT, **how}
except ImportError:
    from mcp.server.fastmcp import FastMCP

    server = FastMCP("listens", host="127.0.0.1", port=PORT, **how)
    run = {}


@server.tool()
def echo(message: str) -> str:
    """Says what it is told."""
    return message


@server.tool()
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("it failed")


server.run(transport="streamable-http", **run)
