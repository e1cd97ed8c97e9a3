"""The processes of a cluster, in the order they start: munged, registry, Berth's own, slurmctld, slurmd."""

import http.client
import os
import socket
import stat

from . import slurm
from .layout import DAEMON_UID, REGISTRY_UID, SEALER_UID, suffix
from .process import Process


def munged(layout):
    key = layout.path("etc", "munge.key")
    if not key.exists():
        with open(os.open(key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o400), "wb") as file:
            file.write(os.urandom(128))
    return Process(
        "munged", layout.folder,
        ["/usr/sbin/munged", "--foreground", f"--key-file={key}", f"--socket={layout.munge_socket}",
         f"--pid-file={layout.path('run', 'munged.pid')}", f"--log-file={layout.path('log', 'munged.own.log')}",
         f"--seed-file={layout.path('run', 'munged.seed')}", "--num-threads=4"],
        environment(layout), ready=lambda: is_socket(layout.munge_socket) and connects(layout.munge_socket),
    )


def registry(layout):
    config = layout.path("etc", "registry.yml")
    slurm.write(config, f"""\
version: 0.1
log: {{level: info, accesslog: {{disabled: false}}}}
storage:
  filesystem: {{rootdirectory: "{layout.path('registry')}"}}
  delete: {{enabled: true}}
  cache: {{blobdescriptor: inmemory}}
http:
  addr: {layout.registry}
""")
    return Process(
        "registry", layout.folder, ["/usr/bin/docker-registry", "serve", config], environment(layout),
        uid=REGISTRY_UID, ready=lambda: http_ok(tcp(layout.registry), "/v2/"),
    )


def slurmctld(layout):
    return Process(
        "slurmctld", layout.folder, [f"{layout.choices['slurm']}/sbin/slurmctld", "-D", "-f", layout.slurm_conf],
        environment(layout) | {"SLURM_CONF": layout.slurm_conf}, ready=lambda: slurm.controller_answers(layout),
    )


def slurmd(layout, node):
    conf = slurm.node_conf(layout, node)
    layout.path("slurmd", node).mkdir(mode=0o755, exist_ok=True)
    return Process(
        f"slurmd-{node}", layout.folder, [f"{layout.choices['slurm']}/sbin/slurmd", "-D", "-N", node, "-f", conf],
        environment(layout) | {"SLURM_CONF": conf, "BERTH_NODE": node},
    )


def sealer(layout):
    return Process(
        "sealer", layout.folder, [layout.path("bin", "berthd"), "seal", "--config", layout.path("etc", "berth.toml")],
        environment(layout) | {"RUST_LOG": "info"}, uid=SEALER_UID,
        ready=lambda: is_socket(layout.path("run", "sealer", "seal.sock")),
    )


def berthd(layout, number=1):
    return Process(
        f"berthd{suffix(number)}", layout.folder, [layout.path("bin", "berthd"), "--config", layout.daemon_config(number)],
        environment(layout) | {"RUST_LOG": "info"}, uid=DAEMON_UID,
        ready=lambda: http_ok(unix(layout.daemon_socket(number)), "/readyz"),
    )


def berthds(layout):
    """All of them, over one store and with one sealer."""
    return [berthd(layout, number) for number in layout.daemons]


def node(layout):
    """One node service for all nodes: they are one machine."""
    return Process(
        "node", layout.folder, [layout.path("bin", "berth-node"), "--config", layout.path("etc", "berth.toml")],
        environment(layout), ready=lambda: is_socket(layout.node_socket) and connects(layout.node_socket, socket.SOCK_SEQPACKET),
    )


def standby(layout):
    """One for all nodes, too."""
    sockets = layout.path("run", "node").glob
    return Process(
        "standby", layout.folder,
        [layout.path("bin", "berth-runtime"), "standby", "--config", layout.path("etc", "berth.toml")],
        environment(layout), ready=lambda: any(connects(path, socket.SOCK_SEQPACKET) for path in sockets("step-*.sock")),
    )


def all_parts(layout):
    parts = [munged(layout), registry(layout)]
    if layout.choices["berth"]:
        parts += [sealer(layout), *berthds(layout), node(layout), standby(layout)]
    return parts + [slurmctld(layout)] + [slurmd(layout, node) for node in layout.nodes]


def environment(layout):
    return {"PATH": slurm.search_path(layout.choices["slurm"]), "LANG": "C.UTF-8", "BERTH_CLUSTER_DIR": layout.folder}


def is_socket(path):
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except (FileNotFoundError, PermissionError):
        return False


def connects(path, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def tcp(address):
    host, port = address.rsplit(":", 1)

    def connect():
        return socket.create_connection((host, int(port)), timeout=5)

    return connect


def unix(path):
    def connect():
        channel = socket.socket(socket.AF_UNIX)
        channel.settimeout(5)
        channel.connect(str(path))
        return channel

    return connect


def http_ok(connect, path):
    """True when a GET of `path` over a fresh connection answers 200."""
    connection = http.client.HTTPConnection("localhost", timeout=5)
    try:
        connection.sock = connect()
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
