"""A service manager that holds descriptors, as systemd does: starts the program over and over, each time with what the
one before left (sd_notify(3): FDSTORE=1; sd_listen_fds(3)). Prints `ready PID` when one says that it is."""

import array
import os
import signal
import socket
import sys

path, program = sys.argv[1], sys.argv[2:]
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.bind(path)
held = {}


def start():
    child = os.fork()
    if child:
        return child
    high = [(name, os.dup(fd)) for name, fd in held.items()]
    # Above all numbers that are given out.
    moved = [(name, fd, 200 + at) for at, (name, fd) in enumerate(high)]
    for _, fd, number in moved:
        os.dup2(fd, number)
    for at, (_, _, number) in enumerate(moved):
        os.dup2(number, 3 + at, inheritable=True)
    os.closerange(3 + len(moved), 400)
    names = ":".join(name for name, _ in high)
    env = os.environ | {"NOTIFY_SOCKET": path, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high)), "LISTEN_FDNAMES": names}
    os.execvpe(program[0], program, env)


def hear(child):
    """Until the child has ended and everything it said was heard."""
    notify.settimeout(0.05)
    ended = False
    while True:
        try:
            text, ancillary, _, _ = notify.recvmsg(4096, socket.CMSG_SPACE(64))
        except TimeoutError:
            if ended:
                return
            ended = os.waitpid(child, os.WNOHANG)[0] == child
            continue
        fields = dict(line.split("=", 1) for line in text.decode().splitlines())
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        name = fields.get("FDNAME")
        if "FDSTOREREMOVE" in fields and name in held:
            os.close(held.pop(name))
        if "FDSTORE" in fields:
            if name in held:
                os.close(held.pop(name))
            held[name] = fds[0]
        if "READY" in fields:
            print(f"ready {child}", flush=True)


def stop(*_):
    os.kill(running, signal.SIGTERM)
    os.waitpid(running, 0)
    os._exit(0)


while True:
    running = start()
    signal.signal(signal.SIGTERM, stop)
    hear(running)
