"""How long a warm start takes: against bare srun, against a Slurm without the plugin, and against ch-run.

Three ways a node may have the image: a fresh mount (no node service, or nobody used it for a while: everything is
decompressed again), a mount that another step uses, and one that the node service kept. On the last of these a step is
also measured as the first of its kind within half a minute, for which the node builds a view; the next ones use it.
"""

import itertools
import os
import pwd
from pathlib import Path

from .clusters import Cluster
from .measure import Variant, added, against, interleave, say, timed, version

SUMMARY = "starting a command in an image that is in the store"
RUNS = 21
IMPORT = "import numpy, scipy.linalg"


def run(runs):
    # What a TaskProlog costs, whatever it does, is Slurm's: the plugin is measured without and with the guard.
    clusters = [
        Cluster("bench-start", "--nodes", "1"),
        Cluster("bench-bare", "--nodes", "1", "--no-berth"),
        Cluster("bench-plugin", "--nodes", "1", "--task-prolog", "none"),
        Cluster("bench-prolog", "--nodes", "1", "--no-berth", "--task-prolog", "/bin/true"),
    ]
    try:
        return measure(runs, *clusters)
    finally:
        for cluster in clusters:
            cluster.down()


def measure(runs, ours, bare, unguarded, prolog):
    say("pushing and pulling the benchmark image")
    image = ours.push("bench", "bench/start:1")
    file = ours.user("berth", "path", image)
    container = f"--container={image}"

    def srun(name, *words, cluster=ours):
        return Variant(name, timed(["srun", *words], **cluster.as_user))

    def group(*variants):
        interleave(list(variants), runs, warm_up=2)
        return variants

    # First without the node service: each job mounts by itself.
    ours.service("stop", "node")
    say("srun true")
    none, alone, other, plain, inside, peer = group(
        srun("no plugin", "true", cluster=bare),
        srun("plugin", "true", cluster=unguarded),
        srun("no plugin, TaskProlog=/bin/true", "true", cluster=prolog),
        srun("srun true", "true"),
        srun("container", container, "true"),
        srun("srun ch-run", "ch-run", file, "--", "true"),
    )
    say("srun -n8 true")
    plain8, inside8, peer8 = group(
        srun("srun -n8 true", "-n8", "true"),
        srun("container -n8", "-n8", container, "true"),
        srun("srun -n8 ch-run", "-n8", "ch-run", file, "--", "true"),
    )
    say(f"python3 -c '{IMPORT}'")
    python, peer_python = group(
        srun("container python", container, "python3", "-c", IMPORT),
        srun("srun ch-run", "ch-run", file, "--", "python3", "-c", IMPORT),
    )
    # A job whose script runs in the image, and starts steps: the node has the image mounted already.
    say("the same while another step of the image runs on the node")
    with ours.running_step(container):
        plain_held, inside_held, peer_held = group(
            srun("srun true", "true"),
            srun("container", container, "true"),
            srun("srun ch-run", "ch-run", file, "--", "true"),
        )
        python_held, peer_python_held = group(
            srun("container python", container, "python3", "-c", IMPORT),
            srun("srun ch-run", "ch-run", file, "--", "python3", "-c", IMPORT),
        )
    say("the same on the mount that the node service kept")
    ours.service("start", "node")
    ours.user("srun", container, "true")
    plain_kept, inside_kept, peer_kept, first_kept = group(
        srun("srun true", "true"),
        srun("container", container, "true"),
        srun("srun ch-run", "ch-run", file, "--", "true"),
        Variant("container, first of its kind", elsewhere_each_time(ours, ["srun", container, "true"])),
    )
    python_kept, peer_python_kept = group(
        srun("container python", container, "python3", "-c", IMPORT),
        srun("srun ch-run", "ch-run", file, "--", "python3", "-c", IMPORT),
    )
    rows = [
        against("srun true, plugin loaded", alone, none),
        added("plugin adds to srun true", alone, none, other, "TaskProlog=/bin/true adds", bar=("value", 1.0)),
        added("plugin and guard add to srun true", plain, none, other, "TaskProlog=/bin/true adds"),
        against("fresh mount: srun --container IMG true", inside, plain),
        added("fresh mount: container adds to srun true", inside, plain, peer, "ch-run adds", bar=("value", 8.0)),
        against("fresh mount: srun --container IMG true", inside, peer),
        added("fresh mount: container adds to srun -n8 true", inside8, plain8, peer8, "ch-run adds"),
        against("fresh mount: srun -n8 --container IMG true", inside8, peer8),
        against("fresh mount: python3, numpy and scipy", python, peer_python),
        added("image in use: container adds to srun true", inside_held, plain_held, peer_held, "ch-run adds",
              bar=("value", 8.0)),
        against("image in use: python3, numpy and scipy", python_held, peer_python_held, bar=("ratio", 0.6)),
        added("kept mount: container adds to srun true", inside_kept, plain_kept, peer_kept, "ch-run adds",
              bar=("value", 3.0)),
        against("kept mount: srun --container IMG true", inside_kept, plain_kept),
        added("kept mount, first of its kind: container adds", first_kept, plain_kept, peer_kept, "ch-run adds"),
        against("kept mount: python3, numpy and scipy", python_kept, peer_python_kept, bar=("ratio", 0.45)),
    ]
    return rows, {"slurm": version("srun", "--version"), "ch-run": version("ch-run", "--version")}


def elsewhere_each_time(cluster, argv):
    """A step in another folder each time: no two of them share a view."""
    home = Path(cluster.as_user["cwd"])
    user = pwd.getpwnam(cluster.settings["BERTH_USER"])
    numbers = itertools.count()

    def run():
        folder = home / f"bench-{next(numbers)}"
        folder.mkdir()
        os.chown(folder, user.pw_uid, user.pw_gid)
        try:
            return timed(argv, **cluster.as_user | {"cwd": folder})()
        finally:
            folder.rmdir()

    return run
