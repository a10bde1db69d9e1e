"""An MCP server of the standard library alone, both eras, for what real servers do not do on request.

    echo.py [--name N] [--version V] [--describe TEXT|@FILE] [--shuffle] [--pid-file FILE]

Tools:
  echo    {"bytes": N} or {"text": T}, {"delay": seconds}   a text of N bytes, later
  fail    {}                     a result with isError
  refuse  {"code": N}            a JSON-RPC error
  ask     {"what": "sampling"|"elicitation"|"roots"}   legacy: asks the client; modern: input_required
  steps   {"count": N}           N progress notifications, then the result
  die     {"bytes": N}           N bytes of a response that never ends, then the process is gone
  change  {"text": T}            echo's description becomes T; list_changed
  connect {"to": IP, "port": N}  a TCP connection of its own; says what came of it
  pour    {"to": IP, "port": N}  one by TCP and one by UDP, over which bytes go without end

`--shuffle`: lists its tools backwards and with their keys in another order.
"""

import argparse
import json
import os
import socket
import sys
import threading
import time

MODERN = "2026-07-28"
META = "io.modelcontextprotocol/"
LEGACY = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"]

options = argparse.ArgumentParser()
options.add_argument("--name", default="echo-py")
options.add_argument("--version", default="1.0.0")
options.add_argument("--describe", default="Says what it is told.")
options.add_argument("--shuffle", action="store_true")
options.add_argument("--pid-file")
options = options.parse_args()
if options.describe.startswith("@"):
    with open(options.describe[1:]) as f:
        options.describe = f.read()

ANY = {"type": "object", "properties": {}}
state = {"description": options.describe, "next": 0}
waiting = {}
writing = threading.Lock()


def send(message):
    line = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
    with writing:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def backwards(value):
    if isinstance(value, dict):
        return {k: backwards(value[k]) for k in sorted(value, reverse=True)}
    return value


def tools():
    described = {
        "echo": state["description"],
        "fail": "Fails.",
        "refuse": "Answers with an error.",
        "ask": "Asks back.",
        "steps": "Reports progress.",
        "die": "Dies.",
        "change": "Changes a description.",
        "connect": "Connects.",
        "pour": "Connects and goes on.",
    }
    listed = [{"name": n, "description": d, "inputSchema": ANY} for n, d in described.items()]
    return backwards_all(listed) if options.shuffle else listed


def backwards_all(listed):
    return [backwards(t) for t in reversed(listed)]


def text(value, error=False):
    result = {"content": [{"type": "text", "text": value}]}
    return {**result, "isError": True} if error else result


class Refused(Exception):
    def __init__(self, code):
        self.error = {"code": code, "message": "refused"}


REQUESTS = {
    "sampling": ("sampling/createMessage", {"messages": [], "maxTokens": 5}),
    "elicitation": (
        "elicitation/create",
        {"message": "well?", "requestedSchema": {"type": "object", "properties": {}}},
    ),
    "roots": ("roots/list", {}),
}


def ask(arguments, params, modern):
    method, wanted = REQUESTS[arguments.get("what", "roots")]
    if modern:
        given = params.get("inputResponses")
        if given:
            return text(f"told {sorted(given)}")
        if method == "elicitation/create":
            wanted = {"mode": "form", **wanted}
        return {
            "resultType": "input_required",
            "inputRequests": {"one": {"method": method, "params": wanted}},
            "requestState": "here",
        }
    state["next"] += 1
    number = f"ask-{state['next']}"
    waiting[number] = answered = threading.Event()
    send({"jsonrpc": "2.0", "id": number, "method": method, "params": wanted})
    answered.wait(20)
    return text("told")


def progress(arguments, params):
    token = params.get("_meta", {}).get("progressToken")
    count = arguments.get("count", 3)
    for step in range(count if token is not None else 0):
        told = {"progressToken": token, "progress": step, "total": count}
        send({"jsonrpc": "2.0", "method": "notifications/progress", "params": told})
    return text(f"{count} steps")


def die(arguments):
    """Straight to the descriptor: no newline, no end."""
    begun = b'{"jsonrpc":"2.0","id":0,"result":{"content":[{"type":"text","text":"'
    count = arguments.get("bytes", 1000)
    with writing:
        os.write(1, (begun + b"x" * count)[:count])
        os._exit(9)


def connect(arguments):
    try:
        with socket.create_connection((arguments["to"], arguments["port"]), timeout=2) as s:
            s.sendall(b"mcp-sensor-attempt")
            return text("connected")
    except OSError as error:
        return text(f"errno {error.errno}", error=True)


def pour(arguments):
    to = (arguments["to"], arguments["port"])
    stream = socket.create_connection(to, timeout=2)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.connect(to)
    for way in (stream, datagrams):
        way.setblocking(False)
        threading.Thread(target=go_on, args=(way,), daemon=True).start()
    return text("poured")


def go_on(way):
    while True:
        try:
            way.send(b"mcp-sensor-attempt")
        except OSError:
            pass
        time.sleep(0.005)


def call(params, modern):
    name, arguments = params.get("name"), params.get("arguments") or {}
    time.sleep(arguments.get("delay", 0))
    if name == "echo":
        return text(arguments["text"] if "text" in arguments else "x" * arguments.get("bytes", 1))
    if name == "fail":
        return text("it failed", error=True)
    if name == "refuse":
        raise Refused(arguments.get("code", -32603))
    if name == "ask":
        return ask(arguments, params, modern)
    if name == "steps":
        return progress(arguments, params)
    if name == "die":
        die(arguments)
    if name == "connect":
        return connect(arguments)
    if name == "pour":
        return pour(arguments)
    if name == "change":
        state["description"] = arguments.get("text", "Changed.")
        send({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
        return text("changed")
    raise Refused(-32602)


def result_of(method, params, modern):
    if method == "initialize":
        asked = params.get("protocolVersion")
        return {
            "protocolVersion": asked if asked in LEGACY else LEGACY[-1],
            "capabilities": {"tools": {"listChanged": True}, "prompts": {}, "resources": {}},
            "serverInfo": {"name": options.name, "version": options.version},
        }
    if method == "server/discover":
        return {"supportedVersions": [MODERN], "capabilities": {"tools": {}, "prompts": {}, "resources": {}}}
    if method == "ping":
        return {}
    if method == "tools/list":
        return {"tools": tools()}
    if method == "prompts/list":
        return {"prompts": [{"name": "greet"}]}
    if method == "prompts/get":
        return {"messages": [{"role": "user", "content": {"type": "text", "text": "hello"}}]}
    if method == "resources/list":
        return {"resources": [{"name": "note", "uri": "note://desk/one"}]}
    if method == "resources/read":
        return {"contents": [{"uri": params["uri"], "text": "a note"}]}
    if method == "tools/call":
        return call(params, modern)
    raise Refused(-32601)


def answer(message):
    params = message.get("params") or {}
    modern = META + "protocolVersion" in (params.get("_meta") or {})
    reply = {"jsonrpc": "2.0", "id": message["id"]}
    try:
        reply["result"] = result = result_of(message["method"], params, modern)
        if modern:
            result.setdefault("resultType", "complete")
            result["_meta"] = {META + "serverInfo": {"name": options.name, "version": options.version}}
            if message["method"].endswith("/list") or message["method"] in ("server/discover", "resources/read"):
                result.update(ttlMs=0, cacheScope="private")
    except Refused as refused:
        reply["error"] = refused.error
    return reply


def handle(message):
    if "method" in message and "id" in message:
        number = message["id"]
        reply = answer(message)
        if number not in cancelled:
            send(reply)
    elif message.get("method") == "notifications/cancelled":
        cancelled.add(message["params"]["requestId"])
    elif "id" in message and message["id"] in waiting:
        waiting.pop(message["id"]).set()


cancelled = set()
if options.pid_file:
    with open(options.pid_file, "w") as f:
        f.write(str(os.getpid()))
for line in sys.stdin.buffer:
    message = json.loads(line)
    if isinstance(message, list):
        replies = [answer(m) for m in message if "id" in m and "method" in m]
        if replies:
            send(replies)
    elif message.get("method") == "tools/call":
        threading.Thread(target=handle, args=(message,), daemon=True).start()
    else:
        handle(message)
