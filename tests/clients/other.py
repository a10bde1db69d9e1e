"""Talks to programs that speak JSON over stdio and are not MCP servers, as their own clients do.

    other.py lsp|dap|acp|codex COMMAND...

Says `spoke N` when the program has answered all N of its requests.
"""

import json
import os
import subprocess
import sys
import threading

KIND, COMMAND = sys.argv[1], sys.argv[2:]
FRAMED = KIND in ("lsp", "dap")

INFO = {"name": "tests", "version": "1.0.0"}
SESSIONS = {
    "lsp": [
        ("initialize", {"processId": None, "clientInfo": INFO, "rootUri": None, "capabilities": {}}),
        ("initialized", None),
        ("textDocument/didOpen", None),
        ("shutdown", {}),
        ("exit", None),
    ],
    "dap": [
        ("initialize", {"clientID": "tests", "adapterID": "python", "pathFormat": "path"}),
        ("disconnect", {"terminateDebuggee": True}),
    ],
    "acp": [
        (
            "initialize",
            {
                "protocolVersion": 1,
                "clientInfo": INFO,
                "clientCapabilities": {"fs": {"readTextFile": True, "writeTextFile": True}, "terminal": True},
            },
        ),
        ("session/new", {"cwd": "/", "mcpServers": []}),
        ("session/prompt", {"sessionId": "one", "prompt": [{"type": "text", "text": "hello"}]}),
    ],
    "codex": [
        ("initialize", {"clientInfo": {**INFO, "title": "tests"}}),
        ("initialized", None),
        ("model/list", {}),
        ("thread/list", {}),
    ],
}
DOCUMENT = {"textDocument": {"uri": "file:///x.py", "languageId": "python", "version": 1, "text": "x = 1\n"}}


def message(number, method, params):
    if KIND == "dap":
        return {"seq": number, "type": "request", "command": method, "arguments": params}
    # Codex leaves `jsonrpc` out.
    start = {} if KIND == "codex" else {"jsonrpc": "2.0"}
    if params is None:
        return {**start, "method": method, "params": DOCUMENT if method.endswith("didOpen") else {}}
    return {**start, "id": number, "method": method, "params": params}


def framed(data):
    return b"Content-Length: %d\r\n\r\n%s" % (len(data), data) if FRAMED else data + b"\n"


def read(stream):
    if not FRAMED:
        return json.loads(stream.readline())
    length = 0
    while (line := stream.readline().strip()) != b"":
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return json.loads(stream.read(length))


def answers(reply, number):
    return reply.get("request_seq" if KIND == "dap" else "id") == number and "method" not in reply


child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
# A program that never answers is an error, not a wait.
threading.Timer(60, child.kill).start()
asked = 0
for number, (method, params) in enumerate(SESSIONS[KIND], 1):
    child.stdin.write(framed(json.dumps(message(number, method, params)).encode()))
    child.stdin.flush()
    if params is not None:
        while not answers(read(child.stdout), number):
            pass
        asked += 1
child.stdin.close()
try:
    child.wait(5)
except subprocess.TimeoutExpired:
    child.kill()
print("spoke", asked, flush=True)
# The timer still waits.
os._exit(0)
