"""Hosts outside: a name server, HTTP, HTTPS, and listeners that nothing of a mediated guest may reach.

Arguments: the directory with certificate and key, and the file that gets a line for all that arrives.
"""
import http.server
import json
import socket
import ssl
import sys
import threading

directory, seen = sys.argv[1:]
ADDRESS = "203.0.113.10"
lock = threading.Lock()


def note(*words):
    with lock, open(seen, "a") as file:
        file.write(" ".join(words) + "\n")


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the request's own fields."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        fields = {name.lower(): value for name, value in self.headers.items()}
        note("http", fields.get("host", ""), fields.get("authorization", ""))
        body = json.dumps({"path": self.path, "fields": sorted(fields)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


def serve(port, context=None):
    server = http.server.ThreadingHTTPServer((ADDRESS, port), Echo)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def names():
    """Answers each question for an address with that of the servers."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("203.0.113.53", 53))
    while True:
        question, client = sock.recvfrom(512)
        end = question.index(0, 12) + 5
        kind = question[end - 4 : end - 2]
        labels, at = [], 12
        while question[at]:
            labels.append(question[at + 1 : at + 1 + question[at]].decode())
            at += question[at] + 1
        note("name", ".".join(labels).lower())
        address = {"inward": "10.9.9.9", "metadata": "169.254.169.254"}.get(labels[0].lower(), ADDRESS)
        count = b"\0\1" if kind == b"\0\1" else b"\0\0"
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4" + socket.inet_aton(address) if kind == b"\0\1" else b""
        sock.sendto(question[:2] + b"\x81\x80\0\1" + count + b"\0\0\0\0" + question[12:end] + answer, client)


def listen(kind, port):
    """Notes whatever arrives at a port."""
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind((ADDRESS, port))
    if kind == socket.SOCK_STREAM:
        sock.listen(16)
    while True:
        if kind == socket.SOCK_STREAM:
            sock.accept()[0].close()
        else:
            sock.recvfrom(512)
        note("stray", str(port))


def watch():
    """Notes packets that neither the process of egress nor an answer to it would send."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    sock.bind(("in0", 0x0800))
    while True:
        data, origin = sock.recvfrom(2048)
        # Packets that leave are seen too.
        if origin[2] == socket.PACKET_OUTGOING:
            continue
        head = 14 + (data[14] & 15) * 4
        source, target = socket.inet_ntoa(data[26:30]), socket.inet_ntoa(data[30:34])
        port = int.from_bytes(data[head + 2 : head + 4], "big")
        is_carried = data[23] == 6 and target == ADDRESS and port in (80, 443)
        is_question = data[23] in (6, 17) and target == "203.0.113.53" and port == 53
        if source != "203.0.113.1" or not (is_carried or is_question):
            note("stray", source, target, f"protocol {data[23]} port {port}")


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(f"{directory}/host.pem", f"{directory}/host.key")
serve(80)
serve(443, context)
for kind, port in ((socket.SOCK_STREAM, 22), (socket.SOCK_STREAM, 8443), (socket.SOCK_DGRAM, 443), (socket.SOCK_DGRAM, 9999)):
    threading.Thread(target=listen, args=(kind, port), daemon=True).start()
threading.Thread(target=names, daemon=True).start()
threading.Thread(target=watch, daemon=True).start()
note("ready")
threading.Event().wait()
