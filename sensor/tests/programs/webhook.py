"""A receiver of webhooks that does what its seed says to each request.

webhook.py PORT FILE SEED FAULTS [CERT KEY CA TOKEN]

Writes each event that it takes to FILE, one line each, before it answers. With
FAULTS it also fails, delays, asks to be left alone, breaks off before and after it
has written, and refuses every request that holds an event whose number is a
multiple of 97. One key never comes with two bodies.
"""

import gzip
import http.server
import json
import random
import socketserver
import ssl
import sys
import time

port, path, seed, faults = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "faults"
cert, key, ca, token = sys.argv[5:9] if len(sys.argv) > 5 else (None,) * 4
chance = random.Random(seed)
out = open(path, "a", encoding="utf-8")
bodies = {}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, text="", headers=()):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if token and self.headers["Authorization"] != token:
            return self.answer(401, "who are you?")
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        if bodies.setdefault(self.headers["Idempotency-Key"], body) != body:
            return self.answer(400, "this key had another body")
        if self.headers["Content-Type"] == "application/json":
            events = json.loads(body)
        else:
            events = [json.loads(line) for line in body.splitlines()]
        what = chance.choice(["take"] * 6 + ["fail", "later", "slow", "before", "after"]) if faults else "take"
        if what == "fail":
            return self.answer(chance.choice([500, 502, 503, 408, 404]), "not now")
        if what == "later":
            return self.answer(429, headers=[("Retry-After", "0")])
        if what == "before":
            self.close_connection = True
            return None
        if faults and any(e["seq"] > 0 and e["seq"] % 97 == 0 for e in events):
            return self.answer(chance.choice([400, 413, 422]), "one of these is bad")
        for event in events:
            out.write(json.dumps(event) + "\n")
        out.flush()
        if what == "slow":
            time.sleep(0.3)
        if what == "after":
            self.close_connection = True
            return None
        return self.answer(chance.choice([200, 202, 204]) if faults else 200)

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


server = Server(("127.0.0.1", port), Handler)
if cert:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
