"""A web server that is no MCP server: JSON-RPC of an Ethereum node's kind at /rpc, nothing at /none, 200
and `{}` to every other POST, whatever it asks. HTTP/1.1 with keep-alive.

    web.py PORT
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(b"<p>hello</p>", "text/html")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/none":
            return self.answer(b"{}", "application/json", 404)
        if self.path != "/rpc":
            return self.answer(b"{}", "application/json")
        request = json.loads(body)
        answer = {"jsonrpc": "2.0", "id": request.get("id")}
        if request["method"] in ("eth_call", "eth_blockNumber"):
            answer["result"] = "0x1"
        else:
            answer["error"] = {"code": -32601, "message": "the method does not exist"}
        self.answer(json.dumps(answer).encode(), "application/json")

    def answer(self, body, kind, status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Web).serve_forever()
