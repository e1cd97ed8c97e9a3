#!/usr/bin/python3
"""A TCP forwarder that holds every byte for a time on its way: what netem does where the kernel has it.

usage: delay.py LISTEN_HOST:PORT TARGET_HOST:PORT SECONDS
"""

import collections
import socket
import sys
import threading
import time

# Bytes on their way at a time in one direction; more than a gigabit holds in the delay.
MOST = 4 << 20


class Line:
    """What was read and is to be written when it is due."""

    def __init__(self, source, target, delay):
        self.source, self.target, self.delay = source, target, delay
        self.parts, self.size, self.news = collections.deque(), 0, threading.Condition()
        for work in (self.read, self.write):
            threading.Thread(target=work, daemon=True).start()

    def read(self):
        while True:
            try:
                part = self.source.recv(1 << 18)
            except OSError:
                part = b""
            with self.news:
                self.parts.append((time.monotonic() + self.delay, part))
                self.size += len(part)
                self.news.notify_all()
                if not part:
                    return
                self.news.wait_for(lambda: self.size < MOST)

    def write(self):
        while True:
            with self.news:
                self.news.wait_for(lambda: self.parts)
                due, part = self.parts.popleft()
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            try:
                if not part:
                    self.target.shutdown(socket.SHUT_WR)
                    return
                self.target.sendall(part)
            except OSError:
                self.source.close()
                return
            with self.news:
                self.size -= len(part)
                self.news.notify_all()


def address(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


def main():
    listen, target, delay = address(sys.argv[1]), address(sys.argv[2]), float(sys.argv[3])
    listener = socket.create_server(listen, backlog=128)
    print("up", flush=True)
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(target)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Line(client, server, delay)
        Line(server, client, delay)


if __name__ == "__main__":
    main()
