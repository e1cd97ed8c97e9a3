"""A start from an image that only the daemon has, over a gigabit link with a delay, against fetching the image first.

The daemon's side of a veth pair is shaped by tbf; netem is not in every kernel, so a forwarder (delay.py) holds each
byte for 1 ms in each direction. The node's side is a network namespace with an empty chunk cache before every run.
"""

import base64
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .clusters import ROOT, Cluster
from .measure import Row, Variant, against, interleave, say, version

SUMMARY = "starting from an image that is only on the daemon, over a slow link"
RUNS = 5
IMPORT = "import numpy, scipy.linalg"
RATE, DELAY_S = "1gbit", 0.001
NAMESPACE, OUTSIDE, INSIDE = "berth-bench", "10.213.77.1", "10.213.77.2"
PORT = 8123


def run(runs):
    cluster = Cluster("bench-lazy", "--nodes", "1")
    try:
        say("pushing and pulling the benchmark image")
        reference = cluster.push("bench", "bench/lazy:1")
        file = Path(cluster.user("berth", "path", reference))
        port = int(next(line.partition(":")[2].strip(' "') for line in config(cluster) if line.startswith("listen")))
        with link(port), tempfile.TemporaryDirectory(prefix="berth-bench-lazy-", dir="/var/tmp") as folder:
            return measure(runs, Node(cluster, file, Path(folder)))
    finally:
        cluster.down()


def config(cluster):
    return Path(cluster.settings["BERTH_CONFIG"]).read_text().splitlines()


@contextlib.contextmanager
def link(port):
    """A namespace that reaches the daemon through the shaped link, and the forwarder."""

    def ip(*words, check=True):
        subprocess.run(["ip", *words], check=check, stderr=None if check else subprocess.DEVNULL)

    ip("netns", "del", NAMESPACE, check=False)
    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "add", "berth-b0", "type", "veth", "peer", "name", "berth-b1", "netns", NAMESPACE)
        ip("addr", "add", f"{OUTSIDE}/30", "dev", "berth-b0")
        ip("link", "set", "berth-b0", "up")
        ip("-n", NAMESPACE, "addr", "add", f"{INSIDE}/30", "dev", "berth-b1")
        ip("-n", NAMESPACE, "link", "set", "berth-b1", "up")
        ip("-n", NAMESPACE, "link", "set", "lo", "up")
        # What goes out of either end waits for its turn.
        shape = ["qdisc", "add", "dev"]
        tbf = ["root", "tbf", "rate", RATE, "burst", "256kb", "latency", "100ms"]
        subprocess.run(["tc", *shape, "berth-b0", *tbf], check=True)
        subprocess.run(["tc", "-n", NAMESPACE, *shape, "berth-b1", *tbf], check=True)
        argv = [sys.executable, ROOT / "scripts" / "benchlib" / "delay.py", f"{OUTSIDE}:{PORT}", f"127.0.0.1:{port}",
                str(DELAY_S)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as forwarder:
            try:
                if forwarder.stdout.readline() != b"up\n":
                    raise SystemExit("bench: the forwarder does not start")
                yield
            finally:
                forwarder.kill()
    finally:
        ip("link", "del", "berth-b0", check=False)
        ip("netns", "del", NAMESPACE, check=False)


class Node:
    """The node's side: fetches, mounts, reads."""

    def __init__(self, cluster, file, folder):
        self.folder = folder
        digest, platform = "sha256:" + file.parent.name.split("-")[0], "linux/amd64"
        record = json.loads((file.parent / "record.dsse.json").read_text())
        sealed = json.loads(base64.b64decode(record["payload"]))["predicate"]["file"]
        self.size, self.root, self.hash_offset = sealed["size"], sealed["verity_root"], sealed["hash_offset"]
        self.url = f"http://{OUTSIDE}:{PORT}/v1/images/{digest}/data?platform={platform}"
        self.grant = self.ask_grant(cluster.settings["BERTH_SOCKET"], digest, platform)
        self.program = Path(os.environ.get("BERTH_BIN_DIR", ROOT / "target" / "release")) / "berth-fuse"
        self.mount_point, self.cache = folder / "mount", folder / "cache"
        self.mount_point.mkdir()
        self.trace, self.whole = folder / "trace.json", folder / "whole.squashfs"
        self.bytes = {}

    @staticmethod
    def ask_grant(path, digest, platform):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(path)
        body = json.dumps({"digest": digest, "platform": platform, "node": "bench", "seconds": 3600})
        connection.request("POST", "/v1/grants", body, {"content-type": "application/json"})
        return json.loads(connection.getresponse().read())["grant"]

    def inside(self, *argv, **options):
        # Not `ip netns exec`, which has mounts of its own.
        enter = ["nsenter", f"--net=/run/netns/{NAMESPACE}"]
        return subprocess.Popen([*enter, *[str(word) for word in argv]], **options)

    def received(self):
        """Bytes that came over the link, with all headers."""
        return int(Path("/sys/class/net/berth-b0/statistics/tx_bytes").read_text())

    def empty(self):
        """Nothing of the image on the node; all of it in the daemon's page cache, for everybody alike."""
        shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir(mode=0o700)
        self.whole.unlink(missing_ok=True)

    def fetch(self):
        argv = ["curl", "--silent", "--show-error", "--fail", "--output", self.whole,
                "--header", f"Authorization: Berth-Grant {self.grant}", self.url]
        start = time.monotonic()
        if self.inside(*argv).wait() != 0:
            raise SystemExit("bench: the image cannot be fetched")
        seconds = time.monotonic() - start
        if self.whole.stat().st_size != self.size:
            raise SystemExit("bench: the image came in part")
        return seconds

    def lazily(self, work, *options):
        """Mounts, works, and takes the mount away again; the time until the work is done."""
        argv = [self.program, "mount", "--verity-root", self.root, "--hash-offset", self.hash_offset,
                "--from", self.url, "--cache", self.cache, *options, "-", self.mount_point]
        start = time.monotonic()
        environment = os.environ | {"BERTH_GRANT": self.grant}
        with self.inside(*argv, stdout=subprocess.PIPE, env=environment) as server:
            if server.stdout.readline() != b"mounted\n":
                raise SystemExit("bench: the image cannot be mounted")
            try:
                work(self.mount_point)
                return time.monotonic() - start
            finally:
                subprocess.run(["umount", self.mount_point], check=True)

    def first_fetched(self, work):
        """The same with the image fetched first, and mounted by the kernel."""
        start = time.monotonic()
        self.fetch()
        subprocess.run(["mount", "-o", "loop,ro", self.whole, self.mount_point], check=True)
        try:
            work(self.mount_point)
            return time.monotonic() - start
        finally:
            subprocess.run(["umount", self.mount_point], check=True)

    def variant(self, name, run):
        """A variant that also keeps how many bytes came over the link."""
        self.bytes[name] = []

        def counted():
            before = self.received()
            seconds = run()
            self.bytes[name].append(self.received() - before)
            return seconds

        return Variant(name, counted, self.empty)

    def moved(self, ours, peer, runs, bar=None):
        """A row of the bytes that came over the link."""
        own, theirs = ([value / 1e6 for value in self.bytes[variant.name][-runs:]] for variant in (ours, peer))
        return Row(f"{ours.name}: bytes", middle(own), peer.name, middle(theirs), "MB", own, bar)


def middle(values):
    return sorted(values)[len(values) // 2]


def python(root):
    subprocess.run(["chroot", root, "/usr/bin/python3", "-c", IMPORT], check=True)


def read_files(root):
    subprocess.run(f"find '{root}' -type f -print0 | xargs -0 -n 512 cat | dd of=/dev/null bs=1M status=none", shell=True,
                   check=True)


def read_image(root):
    subprocess.run(["dd", f"if={root}/image", "of=/dev/null", "bs=1M", "status=none"], check=True)


def measure(runs, node):
    say("recording what the start reads")
    node.empty()
    node.lazily(python, "--record", node.trace)
    rows = starts(runs, node) + reads(runs, node)
    notes = {"link": f"veth, tbf {RATE}, a forwarder that holds bytes {DELAY_S * 1000:.0f} ms each way",
             "curl": version("curl", "--version"), "image_mb": round(node.size / 1e6)}
    return rows, notes


def starts(runs, node):
    fetch = node.variant("fetch of the whole image", node.fetch)
    then = node.variant("fetch, kernel mount, start", lambda: node.first_fetched(python))
    cold = node.variant("start, no trace", lambda: node.lazily(python))
    traced = node.variant("start, with a trace", lambda: node.lazily(python, "--trace", node.trace))
    say(f"python3 -c '{IMPORT}'")
    interleave([fetch, then, cold, traced], runs)
    return [
        against(traced.name, traced, fetch, bar=("ratio", 0.25)),
        node.moved(traced, fetch, runs, bar=("ratio", 0.10)),
        against(traced.name, traced, then),
        against(cold.name, cold, fetch),
        node.moved(cold, fetch, runs),
    ]


def reads(runs, node):
    """Reading all there is: the image's bytes in order; and every file, for which the kernel's driver on a local file
    needs longer than the link does for the image."""
    fetch = node.variant("fetch of the whole image", node.fetch)
    then = node.variant("fetch, kernel mount, read of every file", lambda: node.first_fetched(read_files))
    image = node.variant("read of the image, block mode", lambda: node.lazily(read_image, "--mode", "block"))
    files = node.variant("read of every file", lambda: node.lazily(read_files))
    say("reading everything")
    interleave([fetch, then, image, files], runs)
    return [
        against(image.name, image, fetch, bar=("ratio", 1.15)),
        against(files.name, files, then, bar=("ratio", 1.15)),
        against(files.name, files, fetch),
        node.moved(files, fetch, runs),
    ]
