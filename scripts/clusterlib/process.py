"""Long-running processes by record file.

A record names a process by id, start time and boot: enough to end exactly the process that was started here and
no later one that happens to get its number. Nothing is ever found or ended by name.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Failure(Exception):
    """Something the person at the keyboard must read; `hint` says what to do about it."""

    def __init__(self, message, hint=None):
        super().__init__(message)
        self.hint = hint


def stat_fields(pid):
    """State letter, parent and start time (clock ticks since boot) of a process, or None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[1]), int(fields[19])


def wait_until(what, check, seconds, alive=None):
    """Polls `check` until it answers something true, and gives that back. Ends early when `alive` says no."""
    end = time.monotonic() + seconds
    while True:
        answer = check()
        if answer:
            return answer
        if alive is not None and not alive():
            raise Failure(f"{what}: the process ended")
        if time.monotonic() > end:
            raise Failure(f"{what}: not within {seconds} s")
        time.sleep(0.03)


class Process:
    """One daemon of a cluster: its command, its log and the record of the running process."""

    def __init__(self, name, folder, argv, env, uid=0, ready=None, ready_seconds=30, stop_seconds=10):
        self.name = name
        self.argv = [str(word) for word in argv]
        self.env = {key: str(value) for key, value in env.items()}
        self.uid = uid
        self.ready = ready
        self.ready_seconds = ready_seconds
        self.stop_seconds = stop_seconds
        self.log = folder / "log" / f"{name}.log"
        self.record = folder / "run" / f"{name}.json"

    def pid(self):
        """The id of the running process, or None."""
        try:
            record = json.loads(self.record.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if record["boot"] != BOOT_ID:
            return None
        now = stat_fields(record["pid"])
        if now is None or now[0] in "ZX" or now[2] != record["start"]:
            return None
        return record["pid"]

    def launch(self):
        """Starts it unless it runs; true when it was started. Does not wait: see `wait_ready`."""
        if self.pid() is not None:
            return False
        user = {"user": self.uid, "group": self.uid, "extra_groups": []} if self.uid else {}
        with open(self.log, "ab") as log:
            child = subprocess.Popen(
                self.argv, env=self.env, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, umask=0o022, **user,
            )
        record = {"pid": child.pid, "start": stat_fields(child.pid)[2], "boot": BOOT_ID, "argv": self.argv}
        part = self.record.with_suffix(".part")
        part.write_text(json.dumps(record))
        part.rename(self.record)
        return True

    def wait_ready(self):
        if self.ready is None:
            return
        try:
            wait_until(f"{self.name} is ready", self.ready, self.ready_seconds, alive=lambda: self.pid() is not None)
        except Failure as failure:
            raise Failure(f"{failure}; its log says:\n{self.log_tail()}", hint=f"less {self.log}") from None

    def start(self):
        started = self.launch()
        self.wait_ready()
        return started

    def send(self, number):
        """Sends a signal to the recorded process only; false when it is not running."""
        pid = self.pid()
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if self.pid() == pid:
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)
        return True

    def stop(self, number=signal.SIGTERM):
        """Ends it (SIGKILL after `stop_seconds`) and waits for the end. True when there was something to end."""
        pid = self.pid()
        if pid is None:
            self.record.unlink(missing_ok=True)
            return False
        end_process(pid, number, self.stop_seconds, still=lambda: self.pid() == pid)
        self.record.unlink(missing_ok=True)
        return True

    def log_tail(self, lines=12):
        with contextlib.suppress(FileNotFoundError):
            return "\n".join("    " + line for line in self.log.read_text(errors="replace").splitlines()[-lines:])
        return "    (no log)"


def end_process(pid, number, seconds, still):
    """Signals a process and waits for its end, then kills it. `still` says whether `pid` is still the one meant."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not still():
            return
        signal.pidfd_send_signal(descriptor, number)
        if select.select([descriptor], [], [], seconds)[0]:
            return
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        select.select([descriptor], [], [], 5)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)


def processes_with(fits):
    """(pid, start) of every process for whose environment, a set of b"NAME=VALUE", `fits` answers true."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if fits(set(Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"))):
                fields = stat_fields(int(entry))
                if fields and fields[0] not in "ZX":
                    found.append((int(entry), fields[2]))
    return found


def descendants(roots):
    """(pid, start) of everything below the processes `roots`, the roots left out."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := stat_fields(int(entry))):
            children.setdefault(fields[1], []).append((int(entry), fields[2]))
    found, queue = [], [pid for pid, _ in roots]
    while queue:
        for child in children.get(queue.pop(), []):
            found.append(child)
            queue.append(child[0])
    return found
