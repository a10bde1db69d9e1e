"""A scripted model: enough of the streaming Messages and Responses APIs that an agent calls tools.

    model.py PORT LOG CALLS      CALLS: a JSON list of {"tool", "arguments"}

Every turn with tools asks for the next tool of CALLS that the agent offers, by the end of its name;
after the last it says that it is done. LOG gets a line for each tool that was asked for
({"asked": name, "id"}) and each result that came back ({"told": id, "error": bool}).
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, LOG, CALLS = int(sys.argv[1]), open(sys.argv[2], "w"), json.loads(sys.argv[3])


def log(**record):
    print(json.dumps(record), file=LOG, flush=True)


def plain(name):
    """Some agents know no hyphens."""
    return name.replace("-", "_")


def offered(tools, wanted):
    """What this agent calls a tool of an MCP server, and its namespace if it has one."""
    wanted = plain(wanted)
    for tool in tools:
        for inner in tool.get("tools", []):
            if plain(inner.get("name", "")).endswith(wanted):
                return inner["name"], tool.get("name")
        if plain(tool.get("name", "")).endswith(wanted):
            return tool["name"], None
    return None, None


def messages(body):
    """POST /v1/messages (Anthropic)."""
    told = [
        block
        for message in body["messages"]
        if isinstance(message["content"], list)
        for block in message["content"]
        if block.get("type") == "tool_result"
    ]
    for block in told:
        report(block["tool_use_id"], bool(block.get("is_error")))
    name, _ = offered(body.get("tools", []), CALLS[len(told)]["tool"]) if len(told) < len(CALLS) else (None, None)
    message = {"id": f"msg_{len(told)}", "type": "message", "role": "assistant", "model": body.get("model", "m")}
    message.update(content=[], stop_reason=None, stop_sequence=None, usage={"input_tokens": 1, "output_tokens": 1})
    yield "message_start", {"message": message}
    if name:
        number = f"toolu_{len(told)}"
        block = {"type": "tool_use", "id": number, "name": name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(CALLS[len(told)].get("arguments", {}))}
        log(asked=CALLS[len(told)]["tool"], id=number)
    else:
        block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": "done"}
    yield "content_block_start", {"index": 0, "content_block": block}
    yield "content_block_delta", {"index": 0, "delta": delta}
    yield "content_block_stop", {"index": 0}
    why = {"stop_reason": "tool_use" if name else "end_turn", "stop_sequence": None}
    yield "message_delta", {"delta": why, "usage": {"output_tokens": 1}}
    yield "message_stop", {}


def responses(body):
    """POST /v1/responses (OpenAI)."""
    told = [i for i in body["input"] if i.get("type") == "function_call_output"]
    for item in told:
        # In words alone: those of the Python SDK's servers.
        report(item["call_id"], "Error executing tool" in json.dumps(item["output"]))
    name, space = (
        offered(body.get("tools", []), CALLS[len(told)]["tool"]) if len(told) < len(CALLS) else (None, None)
    )
    number = f"call_{len(told)}"
    if name:
        item = {"type": "function_call", "id": f"fc_{len(told)}", "call_id": number, "name": name}
        item["arguments"] = json.dumps(CALLS[len(told)].get("arguments", {}))
        if space:
            item["namespace"] = space
        log(asked=CALLS[len(told)]["tool"], id=number)
    else:
        text = {"type": "output_text", "text": "done", "annotations": []}
        item = {"type": "message", "id": f"m_{len(told)}", "role": "assistant", "content": [text]}
    response = {"id": f"resp_{len(told)}", "object": "response", "output": []}
    yield "response.created", {"response": {**response, "status": "in_progress"}}
    yield "response.output_item.added", {"output_index": 0, "item": item}
    yield "response.output_item.done", {"output_index": 0, "item": item}
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    done = {**response, "status": "completed", "output": [item], "usage": usage}
    yield "response.completed", {"response": done}


reported = set()


def report(number, error):
    if number not in reported:
        reported.add(number)
        log(told=number, error=error)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply("application/json", json.dumps({"object": "list", "data": [], "models": []}).encode())

    def do_HEAD(self):
        self.reply("application/json", b"")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        path = self.path.split("?")[0]
        if path.endswith("/count_tokens"):
            return self.reply("application/json", b'{"input_tokens": 1}')
        stream = {"/v1/messages": messages, "/v1/responses": responses}.get(path)
        if stream is None:
            return self.reply("application/json", b"{}")
        events = "".join(
            f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n" for kind, data in stream(body)
        )
        self.reply("text/event-stream", events.encode())


print("ready", flush=True)
ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
