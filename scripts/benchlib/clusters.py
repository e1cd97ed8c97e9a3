"""Clusters for benchmarks, by way of scripts/cluster."""

import contextlib
import os
import pwd
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = ROOT / "scripts" / "cluster"


class Cluster:
    """A cluster that is up, and commands in it as the ordinary user."""

    def __init__(self, name, *options):
        self.name = name
        subprocess.run([CLUSTER, "up", name, *options], check=True)
        printed = subprocess.run([CLUSTER, "env", name], check=True, capture_output=True, text=True).stdout
        pairs = (line.removeprefix("export ").split("=", 1) for line in printed.splitlines())
        self.settings = {key: value.strip('"') for key, value in pairs}
        self.registry = self.settings["BERTH_REGISTRY"]
        user = pwd.getpwnam(self.settings["BERTH_USER"])
        environment = self.settings | {"HOME": user.pw_dir, "USER": user.pw_name, "LANG": "C.UTF-8"}
        environment["PATH"] = environment["PATH"].replace("$PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        self.as_user = {"env": environment, "cwd": user.pw_dir, "user": user.pw_uid, "group": user.pw_gid,
                        "extra_groups": os.getgrouplist(user.pw_name, user.pw_gid)}

    def user(self, *argv):
        """Standard output of a command as the ordinary user."""
        done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False, **self.as_user)
        if done.returncode != 0:
            raise SystemExit(f"bench: '{' '.join(map(str, argv))}' failed: {done.stderr.strip()}")
        return done.stdout.strip()

    @contextlib.contextmanager
    def running_step(self, *words):
        """A step that runs for as long as the block does."""
        argv = ["srun", *words, "sh", "-c", "echo up; exec sleep 3600"]
        with subprocess.Popen([str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              **self.as_user) as step:
            try:
                if step.stdout.readline().strip() != b"up":
                    raise SystemExit(f"bench: '{' '.join(argv)}' did not start")
                yield
            finally:
                step.terminate()

    def service(self, do, part):
        """Starts or stops one of its processes."""
        subprocess.run([CLUSTER, "service", self.name, do, part], check=True, stdout=subprocess.DEVNULL)

    def push(self, image, name):
        """Pushes one of scripts/demo-image's images; its reference."""
        target = f"{self.registry}/{name}"
        subprocess.run([ROOT / "scripts" / "demo-image", image, "--push", target], check=True, stdout=subprocess.DEVNULL)
        return f"docker://{target}"

    def down(self):
        subprocess.run([CLUSTER, "down", "--purge", self.name], check=True)
