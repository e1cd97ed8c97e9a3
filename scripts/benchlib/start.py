"""How long a warm start takes: against bare srun, against a Slurm without the plugin, and against ch-run."""

from .clusters import Cluster
from .measure import Variant, added, against, interleave, say, timed, version

SUMMARY = "starting a command in an image that is in the store"
RUNS = 21
IMPORT = "import numpy, scipy.linalg"


def run(runs):
    bare = Cluster("bench-bare", "--nodes", "1", "--no-berth")
    ours = Cluster("bench-start", "--nodes", "1")
    try:
        return measure(ours, bare, runs)
    finally:
        ours.down()
        bare.down()


def measure(ours, bare, runs):
    say("pushing and pulling the benchmark image")
    image = ours.push("bench", "bench/start:1")
    file = ours.user("berth", "path", image)
    container = f"--container={image}"

    def srun(name, *words, cluster=ours):
        return Variant(name, timed(["srun", *words], **cluster.as_user))

    def group(*variants):
        interleave(list(variants), runs, warm_up=2)
        return variants

    say("srun true")
    none, plain, inside, peer = group(
        srun("srun true, no plugin", "true", cluster=bare),
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
    rows = [
        added("no container, plugin loaded: adds", plain, none, none, "no plugin", bar=("value", 1.0)),
        against("srun --container IMG true", inside, plain),
        added("container adds to srun true", inside, plain, peer, "ch-run adds", bar=("value", 8.0)),
        against("srun --container IMG true", inside, peer),
        added("container adds to srun -n8 true", inside8, plain8, peer8, "ch-run adds"),
        against("srun -n8 --container IMG true", inside8, peer8),
        against("python3, numpy and scipy", python, peer_python, bar=("ratio", 0.6)),
    ]
    return rows, {"slurm": version("srun", "--version"), "ch-run": version("ch-run", "--version")}
