"""Where a cluster lives and which ports are its own.

Everything of a cluster lies in one folder with a short path: Unix socket paths end at 108 bytes, and an ordinary
user must be able to walk to it, which a clone below /root does not allow. `cluster.json` there is the one record
of what was chosen; a cluster exists when that file does.
"""

import contextlib
import fcntl
import json
import os
import random
import socket
from pathlib import Path

from .process import Failure

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CLUSTERS = Path(os.environ.get("BERTH_CLUSTERS", "/var/tmp/berth"))
FIRST_PORT, LAST_PORT = 20000, 31999  # below the kernel's range for outgoing connections
# Numbers nobody else uses, without passwd entries: none is needed, and none has to be taken back.
DAEMON_UID, SEALER_UID, REGISTRY_UID, NODE_UID = 64301, 64302, 64303, 64304


class Layout:
    """Paths and choices of one cluster."""

    def __init__(self, name):
        if not name or len(name) > 32 or not all(c.isalnum() or c in "-_" for c in name) or not name.isascii():
            raise Failure(f"a cluster's name is up to 32 letters, digits, '-' and '_', not '{name}'")
        self.name = name
        self.folder = CLUSTERS / name
        self.choices_file = self.folder / "cluster.json"
        self.choices = {}

    def path(self, *parts):
        return self.folder.joinpath(*parts)

    def exists(self):
        return self.choices_file.exists()

    def load(self):
        try:
            self.choices = json.loads(self.choices_file.read_text())
        except FileNotFoundError:
            raise Failure(f"no cluster '{self.name}'", hint=f"scripts/cluster up {self.name}") from None
        # Those that an earlier release made had one, and the machine's Slurm.
        self.choices = {"daemons": 1, "slurm": "/usr"} | self.choices
        return self

    def save(self):
        part = self.choices_file.with_suffix(".part")
        part.write_text(json.dumps(self.choices, indent=1, sort_keys=True) + "\n")
        part.rename(self.choices_file)

    def create(self, choices):
        """Makes the folders and takes ports. Two clusters coming up at once never get the same ones."""
        CLUSTERS.mkdir(mode=0o755, parents=True, exist_ok=True)
        os.chmod(CLUSTERS, 0o755)
        longest = len(str(self.path("run", "munge.socket.2")))
        if longest > 100:
            raise Failure(f"'{self.folder}' is too long a path for Unix sockets",
                          hint="set BERTH_CLUSTERS to a folder with a shorter path")
        with locked(CLUSTERS / ".ports.lock"):
            nodes, daemons = choices["nodes"], choices["daemons"]
            base = free_ports(nodes + 2 + daemons, taken_ports())
            self.choices = choices | {"slurmctld_port": base, "registry_port": base + 1, "api_port": base + 2,
                                      "slurmd_port": base + 3}
            for folder in ("", "bin", "etc", "run", "log", "slurmctld", "slurmd"):
                self.path(folder).mkdir(mode=0o755, exist_ok=True)
            for folder, uid in (("registry", REGISTRY_UID), *((f"daemon{suffix(n)}", DAEMON_UID) for n in self.daemons),
                                ("sealer", SEALER_UID),
                                ("store", SEALER_UID), ("run/daemon", DAEMON_UID), ("run/sealer", SEALER_UID), ("run/node", 0),
                                ("cache", 0)):
                self.path(folder).mkdir(mode=0o755, exist_ok=True)
                os.chown(self.path(folder), uid, uid)
            self.save()

    @property
    def nodes(self):
        return [f"n{number}" for number in range(1, self.choices["nodes"] + 1)]

    @property
    def daemons(self):
        """Their numbers; the first is 1."""
        return range(1, self.choices["daemons"] + 1)

    def daemon_port(self, number=1):
        """The others' ports lie behind those of the nodes."""
        return self.choices["api_port"] if number == 1 else self.choices["slurmd_port"] + self.choices["nodes"] + number - 2

    def daemon_url(self, number=1):
        return f"http://127.0.0.1:{self.daemon_port(number)}"

    def daemon_config(self, number=1):
        """The first one's is everybody's."""
        return self.path("etc", "berth.toml" if number == 1 else f"berthd-{number}.toml")

    @property
    def registry(self):
        return f"127.0.0.1:{self.choices['registry_port']}"

    @property
    def slurm_conf(self):
        return self.path("etc", "slurm.conf")

    @property
    def munge_socket(self):
        return self.path("run", "munge.socket.2")

    def daemon_socket(self, number=1):
        return self.path("run", "daemon", f"api{suffix(number)}.sock")

    @property
    def node_socket(self):
        return self.path("run", "node", "node.sock")

    def started(self, environment):
        """Whether a process with this environment (a set of b"NAME=VALUE") was started by this cluster: its daemons and
        what they start carry its folder, its jobs' tasks its slurm.conf together with the name of a node. A shell
        that sourced `cluster env` has no node's name."""
        if f"BERTH_CLUSTER_DIR={self.folder}".encode() in environment:
            return True
        ours = f"SLURM_CONF={self.path('etc')}/".encode()
        on_a_node = any(entry.startswith(b"SLURMD_NODENAME=") for entry in environment)
        return on_a_node and any(entry.startswith(ours) for entry in environment)


def suffix(number):
    """What the names of a second daemon's files end with."""
    return "" if number == 1 else f"-{number}"


def all_clusters():
    if not CLUSTERS.is_dir():
        return []
    return [Layout(entry.name) for entry in sorted(CLUSTERS.iterdir()) if (entry / "cluster.json").exists()]


@contextlib.contextmanager
def locked(path):
    with open(path, "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def taken_ports():
    """Ports that other clusters hold by their records, whether they run or not."""
    taken = set()
    for cluster in all_clusters():
        with contextlib.suppress(Failure, json.JSONDecodeError, KeyError):
            choices = cluster.load().choices
            end = choices["slurmd_port"] + choices["nodes"] + choices["daemons"] - 1
            taken.update(range(choices["slurmctld_port"], end))
    return taken


def free_ports(count, taken):
    """The first of `count` ports in a row that nobody holds."""
    starts = list(range(FIRST_PORT, LAST_PORT - count, 128))
    random.shuffle(starts)
    for start in starts:
        if all(port not in taken and can_bind(port) for port in range(start, start + count)):
            return start
    raise Failure(f"no {count} free ports in a row between {FIRST_PORT} and {LAST_PORT}")


def can_bind(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
