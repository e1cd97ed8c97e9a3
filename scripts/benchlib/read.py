"""Reading an image through each way to mount it: files through FUSE, the kernel's driver on an image through FUSE (block
mode), the kernel's driver, squashfuse_ll, and the same tree as plain ext4.

Cold means: unmounted, loop device gone, server ended, and the pages of the image's file thrown out with
fadvise(DONTNEED), the same for all; mincore shows that none is left. Warm means: mounted, and read once before. What is
measured is a helper without a tool around it (reader.c); the CPU rows are the busy time of the whole machine meanwhile,
so that threads of the kernel and servers count. Nothing is bound to a CPU but the readers of the rows that say so, which
are bound as tasks of a job are.

A kernel built with CONFIG_SQUASHFS_DECOMP_SINGLE is the weakest there is: it decompresses on one CPU.
"""

import contextlib
import gzip
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import layers
from .clusters import ROOT
from .measure import Row, Variant, against, interleave, say

SUMMARY = "reading an image: files, random places, walks, a Python start, cold and warm"
RUNS = 5
IMPORT = "import numpy, scipy.linalg"
BOUND = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
HERE = Path(__file__).resolve().parent
WORK = ROOT / "target" / "bench" / "read"
READER = WORK / "reader"
PACK = ROOT / "target" / "release" / "examples" / "pack"
BERTH_FUSE = ROOT / "target" / "release" / "berth-fuse"
READY_S = 10
CASES = ("walk", "sequential", "sequential-warm", "parallel", "random", "open-files", "python")
COLD_READS, WARM_READS, OPEN_READS = 500, 20000, 200000
# Of the image's files, so many bytes are read: each round reads them once through every mount.
READ_BYTES = 400 << 20


def add_arguments(parser):
    parser.add_argument("--squashfuse", metavar="FILE", type=Path, action="append", default=[],
                        help="another squashfuse_ll to measure")
    parser.add_argument("--only", metavar="CASE", choices=CASES, action="append",
                        help=f"measure only this ({', '.join(CASES)})")


def run(runs, arguments):
    if not arguments.no_build:
        subprocess.run(["cargo", "build", "--locked", "--release", "-p", "berth-squashfs", "--example", "pack"],
                       cwd=ROOT, check=True)
    made = Made()
    # Told to end, it unmounts what it has mounted.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="berth-bench-read-", dir="/var/tmp") as folder:
        folder = Path(folder)
        ours, block = Ours(folder / "files", made.image), Block(folder / "block", made.image)
        kernel = Kernel("kernel squashfs", folder / "kernel", made.image, "squashfs")
        plain = Kernel("ext4", folder / "ext4", made.ext4, "ext4")
        peers = [Squashfuse(folder / f"squashfuse{at}", made.image, program)
                 for at, program in enumerate(["/usr/bin/squashfuse_ll", *arguments.squashfuse])]
        bench = Bench(made, runs, ours, block, kernel, plain, peers)
        rows = []
        for case in arguments.only or CASES:
            say(f"{case}, {runs} rounds")
            rows += getattr(bench, case.replace("-", "_"))()
        return rows, notes(made) | {"squashfuse": [peer.name for peer in peers], "reads_of_the_server_warm": bench.asked}


class Made:
    """The benchmark image as a tree, an image and an ext4; made once."""

    def __init__(self):
        layout = layers.demo_image("bench")
        stamp = WORK / "made"
        self.image, self.ext4, self.files = WORK / "image.squashfs", WORK / "image.ext4", WORK / "files"
        wanted = (layout / "index.json").read_text()
        WORK.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cc", "-O2", "-o", READER, HERE / "reader.c"], check=True)
        if not stamp.exists() or stamp.read_text() != wanted:
            say("making the benchmark's image")
            with tempfile.TemporaryDirectory(prefix=".work.", dir=WORK) as work:
                layers.flatten(layout, f"{work}/flat")
                tree = f"{work}/flat/rootfs"
                subprocess.run([PACK, tree, self.image], check=True, stdout=subprocess.DEVNULL)
                listed = subprocess.run([READER, "list", tree], check=True, capture_output=True).stdout
                self.files.write_bytes(listed)
                self.ext4.unlink(missing_ok=True)
                used = int(subprocess.run(["du", "-sm", tree], check=True, capture_output=True).stdout.split()[0])
                subprocess.run(["truncate", "-s", f"{used * 5 // 4 + 256}M", self.ext4], check=True)
                subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", tree, self.ext4], check=True,
                               stderr=subprocess.DEVNULL)
                subprocess.run(["debugfs", "-w", "-R", "rmdir lost+found", self.ext4], check=True,
                               stderr=subprocess.DEVNULL)
            subprocess.run(["sync", "-f", WORK], check=True)
            stamp.write_text(wanted)
        listed = [(int(line.split(b" ", 1)[0]), line) for line in self.files.read_bytes().splitlines(keepends=True)]
        self.bytes = sum(size for size, _ in listed)
        # What is read of it: whole files from the tree's start on.
        self.files = WORK / "files.read"
        self.read, part = 0, []
        for size, line in listed:
            if self.read + size <= READ_BYTES:
                self.read += size
                part.append(line)
        self.files.write_bytes(b"".join(part))


def evict(path):
    """Throws a file's pages out of the page cache, and looks that they are."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "RES", path], check=True,
                          capture_output=True, text=True).stdout.strip()
    if int(left) > 1 << 20:
        raise SystemExit(f"bench: {left} bytes of '{path}' stay in the page cache")


class Mounted:
    """A way to mount; `serve` does it, `stop` undoes it all."""

    def __init__(self, name, folder, source):
        self.name, self.folder, self.source = name, folder, source
        self.mounted = False
        folder.mkdir()

    def fresh(self):
        """Mounted anew, with nothing of it in any cache."""
        self.end()
        evict(self.source)
        self.serve()
        self.mounted = True

    def end(self):
        if self.mounted:
            self.stop()
            self.mounted = False

    def stop(self):
        subprocess.run(["umount", self.folder], check=True)


class Kernel(Mounted):
    """A loop mount."""

    def __init__(self, name, folder, source, kind):
        super().__init__(name, folder, source)
        self.kind = kind

    def serve(self):
        subprocess.run(["mount", "-t", self.kind, "-o", "ro,loop", self.source, self.folder], check=True)


class Served(Mounted):
    """A program that serves a mount until it is unmounted."""

    def start(self, argv, folder):
        self.server = subprocess.Popen([str(word) for word in argv], stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL)
        bound = time.monotonic() + READY_S
        while not os.path.ismount(folder):
            if self.server.poll() is not None or time.monotonic() > bound:
                raise SystemExit(f"bench: {self.name} did not mount")
            time.sleep(0.001)

    def stop(self):
        super().stop()
        self.server.wait(READY_S)


class Squashfuse(Served):
    def __init__(self, folder, source, program):
        said = subprocess.run([program, "--help"], check=False, capture_output=True, text=True)
        found = re.search(r"squashfuse (\d\S*)", said.stdout + said.stderr)
        super().__init__(f"squashfuse_ll {found[1] if found else program}", folder, source)
        self.program = program

    def serve(self):
        self.start([self.program, "-f", self.source, self.folder], self.folder)


class Ours(Served):
    def __init__(self, folder, source):
        super().__init__("berth", folder, source)

    def serve(self):
        self.start([BERTH_FUSE, "mount", self.source, self.folder], self.folder)

    def reads(self):
        """What the server has read so far: requests of the kernel's, and parts of the image."""
        pid = self.server.pid
        serving, = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(re.search(r"syscr: (\d+)", Path(f"/proc/{serving}/io").read_text())[1])


class Block(Served):
    """The kernel's driver on a loop device on the image's bytes, which come through FUSE."""

    def __init__(self, folder, source):
        super().__init__("berth, block mode", folder, source)
        self.bytes = folder.with_name(folder.name + ".bytes")
        self.bytes.mkdir()

    def serve(self):
        self.start([BERTH_FUSE, "mount", "--mode", "block", self.source, self.bytes], self.bytes)
        subprocess.run(["mount", "-t", "squashfs", "-o", "ro,loop", self.bytes / "image", self.folder], check=True)

    def stop(self):
        subprocess.run(["umount", self.folder], check=True)
        # The loop device lets go of the file a moment later.
        bound = time.monotonic() + READY_S
        while subprocess.run(["umount", self.bytes], check=False, stderr=subprocess.DEVNULL).returncode != 0:
            if time.monotonic() > bound:
                raise SystemExit(f"bench: '{self.bytes}' stays busy")
            time.sleep(0.001)
        self.server.wait(READY_S)


def busy():
    """CPU seconds that the machine has worked since it started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    # user, nice, system, irq, softirq: all but idle, waiting and what others of the host took.
    return (sum(fields[:3]) + sum(fields[5:7])) / os.sysconf("SC_CLK_TCK")


class Bench:
    """The cases: each gives rows."""

    def __init__(self, made, runs, ours, block, kernel, plain, peers):
        self.made, self.runs = made, runs
        self.ours, self.block, self.kernel, self.plain, self.peers = ours, block, kernel, plain, peers
        self.all = [ours, block, kernel, plain, *peers]
        self.amounts = {}
        # What reached our server in one more warm round, by case: what is not its doing is the kernel's.
        self.asked = {}

    def reader(self, what, system, *more, bound=()):
        """Seconds of one run of the helper; all systems must give as much."""
        argv = [*bound, READER, what, system.folder, *map(str, more)]
        done = subprocess.run(argv, check=True, capture_output=True, text=True, env={"FILES": self.made.files})
        amount, seconds = done.stdout.split()
        if self.amounts.setdefault((what, *more), amount) != amount:
            raise SystemExit(f"bench: {what} gave {amount} through {system.name}, not {self.amounts[what, *more]}")
        return float(seconds)

    def cold(self, work, systems=None):
        """Variants by system, each run on a fresh mount; `cpu` is the machine's busy seconds, run by run."""
        variants = {}
        for system in systems or self.all:
            cpu = []

            def measured(system=system, cpu=cpu):
                before = busy()
                seconds = work(system)
                cpu.append(busy() - before)
                return seconds

            variants[system] = Variant(system.name, measured, system.fresh)
            variants[system].cpu = cpu
        with self.ended():
            interleave(list(variants.values()), self.runs, warm_up=0)
        return variants

    def warm(self, case, work, before=None):
        """Variants by system, each mounted and read (`before`, or the same work) once."""
        with self.ended():
            for system in self.all:
                system.fresh()
                (before or work)(system)
            variants = {system: Variant(system.name, lambda system=system: work(system)) for system in self.all}
            interleave(list(variants.values()), max(self.runs, 11))
            reads = self.ours.reads()
            work(self.ours)
            self.asked[case] = self.ours.reads() - reads
            say(f"{case}, warm: {self.asked[case]} reads of the server's in a round")
        return variants

    @contextlib.contextmanager
    def ended(self):
        try:
            yield
        finally:
            for system in self.all:
                system.end()

    def rows(self, case, variants, bars, block_bar=None, unit="ms", scale=1000):
        """Ours against every peer, then block mode against the kernel's driver; `bars` by peer."""
        peers = [system for system in variants if system not in (self.ours, self.block)]
        rows = [against(case, variants[self.ours], variants[peer], unit, scale, bars.get(peer)) for peer in peers]
        if self.block in variants:
            rows.append(against(f"{case}, block mode", variants[self.block], variants[self.kernel], unit, scale,
                                block_bar))
        return rows

    def cpu(self, case, variants):
        """The same for CPU seconds."""
        def of(system):
            return sorted(variants[system].cpu)[self.runs // 2]

        peers = [system for system in variants if system not in (self.ours, self.block)]
        rows = [Row(f"{case}, CPU", of(self.ours), peer.name, of(peer), "s", variants[self.ours].cpu) for peer in peers]
        if self.block in variants:
            rows.append(Row(f"{case}, block mode, CPU", of(self.block), self.kernel.name, of(self.kernel), "s",
                            variants[self.block].cpu))
        return rows

    def walk(self):
        def work(system, bound=()):
            return self.reader("walk", system, bound=bound)

        debian = self.peers[0]
        cold, warm = self.cold(work), self.warm("walk", work)
        bound = self.cold(lambda system: work(system, BOUND))
        return [
            *self.rows("walk, cold", cold, {self.kernel: ("ratio", 1.5), debian: ("ratio", 0.3)}),
            *self.cpu("walk, cold", cold),
            *self.rows("walk, cold, bound", bound, {self.kernel: ("ratio", 1.5), debian: ("ratio", 0.3)}),
            *self.rows("walk, warm", warm, {self.kernel: ("ratio", 1.3), debian: ("ratio", 0.3)}, ("ratio", 1.1)),
        ]

    def read_all(self, system):
        return self.reader("sequential", system)

    def sequential(self):
        cold = self.cold(self.read_all)
        # How fast the image's own bytes come from the disk.
        bare = Variant("pread of the image", lambda: float(subprocess.run(
            [READER, "file", self.made.image], check=True, capture_output=True, text=True).stdout.split()[1]),
            lambda: evict(self.made.image))
        interleave([bare], self.runs, warm_up=0)
        return [
            *self.rows("sequential, cold", cold, {self.kernel: ("ratio", 1.1)}, unit="s", scale=1),
            against("sequential, cold", cold[self.ours], bare, "s", 1),
            *self.cpu("sequential, cold", cold),
        ]

    def sequential_warm(self):
        warm = self.warm("sequential", self.read_all)
        return self.rows("sequential, warm", warm, {self.plain: ("ratio", 1.1)}, ("ratio", 1.1))

    def parallel(self):
        rows = []
        for readers in (2, 8):
            variants = self.cold(lambda system: self.reader("sequential", system, readers),
                                 [self.ours, self.kernel, self.peers[0]])
            bars = {self.kernel: ("ratio", 1.0)} if readers == 2 else {}
            rows += self.rows(f"{readers} readers, cold", variants, bars, unit="s", scale=1)
        return rows

    def random(self):
        cold = self.cold(lambda system: self.reader("random", system, COLD_READS))
        warm = self.warm("random", lambda system: self.reader("random", system, WARM_READS), self.read_all)
        return [
            *self.rows(f"{COLD_READS} random 4 KiB, cold", cold, {}),
            *self.rows(f"{WARM_READS} random 4 KiB, warm", warm, {self.plain: ("ratio", 1.1)}, ("ratio", 1.1)),
        ]

    def open_files(self):
        """Reads alone: what opening and closing costs is in the row before."""
        warm = self.warm("open files", lambda system: self.reader("open", system, OPEN_READS), self.read_all)
        return self.rows(f"{OPEN_READS} random 4 KiB in open files, warm", warm, {self.plain: ("ratio", 1.1)},
                         ("ratio", 1.1))

    def python(self):
        def work(system, bound=()):
            argv = [*bound, "/usr/sbin/chroot", system.folder, "/usr/bin/python3", "-c", IMPORT]
            start = time.monotonic()
            subprocess.run(argv, check=True, env={"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"})
            return time.monotonic() - start

        cold, warm = self.cold(work), self.warm("Python", work)
        bound = self.warm("Python, bound", lambda system: work(system, BOUND))
        return [
            *self.rows("Python with numpy and scipy, cold", cold, {}),
            *self.rows("Python with numpy and scipy, warm", warm, {self.plain: ("ratio", 1.1)}, ("ratio", 1.1)),
            *self.rows("Python with numpy and scipy, warm, bound", bound, {self.plain: ("ratio", 1.1)}, ("ratio", 1.1)),
        ]


def notes(made):
    options = {}
    with contextlib.suppress(OSError):
        text = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
        options = {line for line in text.splitlines() if line.startswith("CONFIG_SQUASHFS_") and line.endswith("=y")}
    return {"image_bytes": made.image.stat().st_size, "unpacked_bytes": made.bytes, "read_bytes": made.read,
            "kernel_squashfs": sorted(option.removesuffix("=y") for option in options)}
