"""An MCP server over HTTP on the Python SDK, 1.x or 2.x as its environment has it.

    over_http.py PORT

Tools:
  connect {"to": IP, "port": N}  a TCP connection of its own; says what came of it
"""

import socket
import sys

PORT = int(sys.argv[1])

try:
    from mcp.server.mcpserver import MCPServer

    server, options = MCPServer("over-http"), {"host": "127.0.0.1", "port": PORT}
except ModuleNotFoundError:
    from mcp.server.fastmcp import FastMCP

    server, options = FastMCP("over-http", host="127.0.0.1", port=PORT), {}


@server.tool()
def connect(to: str, port: int) -> str:
    try:
        socket.create_connection((to, port), 5).close()
        return "ok"
    except OSError as error:
        return str(error)


server.run("streamable-http", **options)
