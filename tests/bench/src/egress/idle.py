"""Opens connections over TLS with one request each, prints a line, and keeps them until its input ends."""
import socket, ssl, sys, time

host, number = sys.argv[1], int(sys.argv[2])
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
kept = []
for _ in range(number):
    connection = context.wrap_socket(socket.create_connection((host, 443)), server_hostname=host)
    connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer mock-KEY\r\n\r\n".encode())
    while b"x" * 64 not in connection.recv(65536):
        pass
    kept.append(connection)
    # A guest may make 200 connections in a second.
    time.sleep(0.006)
print("ready", flush=True)
sys.stdin.read()
