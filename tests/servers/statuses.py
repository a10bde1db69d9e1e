"""An HTTP server that answers with the status that the path names: GET /401. Listens on PORT."""

import os
import socket
import threading


def serve(connection):
    rest = b""
    while True:
        while b"\r\n\r\n" not in rest:
            piece = connection.recv(65536)
            if not piece:
                return
            rest += piece
        head, _, rest = rest.partition(b"\r\n\r\n")
        status = head.split(b" ")[1][1:4]
        connection.sendall(b"HTTP/1.1 %s Said\r\ncontent-length: 2\r\n\r\nno" % status)


listener = socket.create_server(("::", int(os.environ["PORT"])), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
