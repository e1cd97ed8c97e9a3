"""From layers in a registry to a published image: against unpacking and packing, tar2sqfs, and the cost of the bare work.

Everything lies on one filesystem: a tmpfs for the rows with bars, then once more on a disk. (a) is skopeo, umoci unpack
and mksquashfs; (b) is tar2sqfs fed with the flattened tree by pigz; (c) is the CPU time of what cannot be left out, by
the libraries that Berth links (convert/examples/floor.rs), and of the registry and curl for the same blobs, spread
over all cores.
"""

import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from . import layers
from .clusters import CLUSTER, ROOT, Cluster
from .measure import Row, Variant, against, interleave, say, timed, version

SUMMARY = "making an image: from a registry to the store"
RUNS = 5
CORES = os.cpu_count()
COMPRESSION = "zstd, level 3, blocks of 128 KiB"
FLOOR = ROOT / "target" / "release" / "examples" / "floor"
# Peak memory may be this, and so much for each entry (issue 4).
MEMORY_MIB, MEMORY_ENTRY = 256, 400
MANY = (1, 10, 100)


def add_arguments(parser):
    parser.add_argument("--many", action="store_true", help="instead: 1, 10 and 100 layers of the same content")
    parser.add_argument("--no-disk", action="store_true", help="leave out the round on a disk")


def run(runs, arguments):
    if not arguments.no_build:
        subprocess.run(["cargo", "build", "--locked", "--release", "-p", "berth-convert", "--example", "floor"],
                       cwd=ROOT, check=True)
    image = layers.demo_image("bench")
    with tmpfs() as folder:
        rows, notes = many(runs, folder, image) if arguments.many else compare(runs, folder, image, bars=True)
    if not arguments.many and not arguments.no_disk:
        with tempfile.TemporaryDirectory(prefix="berth-bench-", dir="/var/tmp") as folder:
            more, _ = compare(1, Path(folder), image, bars=False)
            rows += more
    return rows, notes


@contextlib.contextmanager
def tmpfs():
    folder = Path(tempfile.mkdtemp(prefix="berth-bench-", dir="/var/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "berth-bench", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def compare(runs, folder, image, bars):
    where = "tmpfs" if bars else "disk"
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(site_in(folder))
        reference = site.push(image)
        tar = Path(shutil.copy(layers.flattened(image), folder))
        ours = Variant("berth pull", lambda: site.pull(reference), site.reset)
        work = folder / "peers"

        def clean():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()

        source = reference.removeprefix("docker://")
        unpack = timed(["sh", "-ec", f"""
            skopeo copy --quiet --src-tls-verify=false docker://{source} oci:{work}/oci:1
            umoci unpack --image {work}/oci:1 {work}/bundle
            mksquashfs {work}/bundle/rootfs {work}/a.squashfs -comp zstd -Xcompression-level 3 -b 128K \
                -noappend -no-progress -quiet"""])
        peer_sizes, spent = [], {"unpacked": [], "piped": []}

        def run_unpack():
            seconds = metered(unpack, spent["unpacked"])
            peer_sizes.append((work / "a.squashfs").stat().st_size)
            return seconds

        unpacked = Variant("skopeo, umoci, mksquashfs", run_unpack, clean)
        pipe = timed(["sh", "-ec", f"""
            pigz -dc {tar} | tar2sqfs --quiet --force --compressor zstd --comp-extra level=3 \
                --block-size 131072 --num-jobs {CORES} {work}/b.squashfs"""])
        piped = Variant("pigz, tar2sqfs", lambda: metered(pipe, spent["piped"]), clean)
        floor = Variant("floor", lambda: site.floor(image, source, work), clean)
        say(f"on {where}: {runs} rounds")
        interleave([ours, unpacked, piped, floor], runs, warm_up=1 if bars else 0)
        case = f"registry to store, {where}"
        rows = [
            against(case, ours, unpacked, "s", 1, ("ratio", 0.30) if bars else None),
            against(case, ours, piped, "s", 1, ("ratio", 0.80) if bars else None),
            against(case, ours, floor, "s", 1, ("ratio", 1.4) if bars else None),
        ]
        if not bars:
            return rows, {}
        cpu = [run["cpu"] for run in site.runs[-runs:]]
        own = statistics.median(cpu)
        for peer, theirs in ((unpacked.name, statistics.median(spent["unpacked"])),
                             (piped.name, statistics.median(spent["piped"])), ("floor", floor.median * CORES)):
            rows.append(Row("CPU seconds, ours with the registry's", own, peer, theirs, "s", cpu))
        facts = site.inspect(reference)
        rows += [site.memory(facts), *sizes(facts, peer_sizes[-1] / 2**20)]
        return rows, notes() | {"image": f"{len(layers.blobs(image))} layers", "floor": site.last_floor,
                                "ours_cpu": site.runs[-1]}


def metered(run, spent):
    """Runs a command and notes its CPU seconds, those of its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return seconds


def sizes(facts, theirs):
    ours = facts["squashfs_size"] / 2**20
    whole = facts["size"] / 2**20
    peer = "mksquashfs"
    return [
        Row("size of the image", ours, peer, theirs, "MiB", [ours], ("ratio", 1.02)),
        Row("size with its hash tree", whole, peer, theirs, "MiB", [whole]),
    ]


def many(runs, folder, image):
    """The same content in more and more layers."""
    with site_in(folder) as site:
        variants = []
        for count in MANY:
            split = layers.split(image, count)
            reference = site.push(split)
            variants.append(Variant(f"{count} layers", lambda reference=reference: site.pull(reference), site.reset))
        interleave(variants, runs)
        one, *more = variants
        rows = [against(f"the same in {variant.name}", variant, one, "s", 1) for variant in more]
        return rows, notes()


def notes():
    programs = {"skopeo": ["--version"], "umoci": ["--version"], "mksquashfs": ["-version"],
                "tar2sqfs": ["--version"], "pigz": ["--version"], "docker-registry": ["--version"], "curl": ["--version"]}
    found = {name: version(name, *words) for name, words in programs.items()}
    found |= {"berth": version(ROOT / "target/release/berth", "--version"), "compression": COMPRESSION}
    say(f"{CORES} cores; {COMPRESSION}; " + "; ".join(found.values()))
    return found


@contextlib.contextmanager
def site_in(folder):
    """A registry, a daemon and a sealer with everything they write in `folder`."""
    os.environ["BERTH_CLUSTERS"] = str(folder)
    try:
        yield Site(Cluster("convert", "--nodes", "1"), folder / "convert")
    finally:
        subprocess.run([CLUSTER, "down", "--purge", "convert"], check=True)


class Site:
    def __init__(self, cluster, folder):
        self.cluster = cluster
        self.folder = folder
        self.runs = []
        self.peaks = {}
        self.last_floor = {}

    def push(self, image):
        target = f"{self.cluster.registry}/bench/{image.name}:1"
        subprocess.run(["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{image}:1", f"docker://{target}"],
                       check=True)
        return f"docker://{target}"

    def service(self, what, name):
        done = subprocess.run([CLUSTER, "service", self.cluster.name, what, name], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def pids(self):
        return [int(self.service("pid", name)) for name in ("registry", "berthd", "sealer")]

    def reset(self):
        """A site that has never seen an image."""
        for name in ("berthd", "sealer"):
            self.service("stop", name)
        for path in [*(self.folder / "daemon").iterdir(), *(self.folder / "store").iterdir()]:
            if path.name == "FORMAT":
                continue
            if path.is_dir():
                shutil.rmtree(path)
                if path.parent.name == "store":
                    path.mkdir(mode=0o755)
                    facts = path.parent.stat()
                    os.chown(path, facts.st_uid, facts.st_gid)
            else:
                path.unlink()
        for name in ("sealer", "berthd"):
            self.service("start", name)

    def pull(self, reference):
        """Seconds of a pull; the first one's memory is watched, and it counts for no time."""
        pids = self.pids()
        before = [cpu_seconds(pid) for pid in pids]
        with contextlib.nullcontext() if self.peaks else self.watched(pids[1:]):
            seconds = timed(["berth", "pull", "--quiet", reference], **self.cluster.as_user)()
        spent = [cpu_seconds(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
        self.runs.append({"cpu": sum(spent), "registry": spent[0], "berthd": spent[1], "sealer and converter": spent[2]})
        return seconds

    @contextlib.contextmanager
    def watched(self, roots):
        """Notes the peak memory of these processes and their children while the block runs."""
        over = threading.Event()

        def watch():
            while not over.wait(0.02):
                for pid in [*roots, *(child for root in roots for child in children(root))]:
                    self.peaks[pid] = max(self.peaks.get(pid, 0), high_water(pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def inspect(self, reference):
        """The record's facts about the image's file, and how many entries it has."""
        record = json.loads(self.cluster.user("berth", "--json", "inspect", reference))
        return layers.find(record, "file") | {"entries": layers.find(record, "conversion")["entries"]}

    def memory(self, facts):
        """Peak memory of daemon, sealer and converter: the sum of each one's own peak, so at least theirs together."""
        ours = sum(self.peaks.values()) / 1024
        bar = MEMORY_MIB + MEMORY_ENTRY * facts["entries"] / 2**20
        return Row("peak memory", ours, f"256 MiB and 400 B for each of {facts['entries']} entries", bar, "MiB", [ours],
                   ("ratio", 1.0))

    def floor(self, image, source, work):
        """CPU seconds of the bare work, divided by the cores."""
        registry = self.pids()[0]
        before, own = cpu_seconds(registry), resource.getrusage(resource.RUSAGE_CHILDREN)
        host, _, rest = source.partition("/")
        repository = rest.rpartition(":")[0]
        for number, blob in enumerate(layers.blobs(image)):
            url = f"http://{host}/v2/{repository}/blobs/sha256:{blob.name}"
            subprocess.run(["curl", "--silent", "--fail", "--output", work / str(number), url], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        transfer = cpu_seconds(registry) - before
        transfer += after.ru_utime + after.ru_stime - own.ru_utime - own.ru_stime
        done = subprocess.run([FLOOR, *layers.blobs(image)], check=True, capture_output=True, text=True)
        parts = json.loads(done.stdout)
        self.last_floor = parts | {"registry and curl": transfer}
        return (transfer + sum(parts[name] for name in ("blob_sha256", "inflate", "tar_sha256", "zstd"))) / CORES


def cpu_seconds(pid):
    """Of a process and the children it has waited for."""
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text[text.rindex(")") + 2:].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def children(pid):
    with contextlib.suppress(OSError):
        return [int(word) for task in Path(f"/proc/{pid}/task").iterdir()
                for word in (task / "children").read_text().split()]
    return []


def high_water(pid):
    """Peak resident KiB of a process; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0
