"""Berth's own parts of a cluster: binaries, berth.toml, the site's key, the store.

Binaries are copied into the cluster's folder: a clone may lie where an ordinary user cannot go, and a build must not
change what a running cluster uses. `up` on a running cluster copies newer ones and restarts what runs the old ones.
"""

import os
import shutil
import subprocess
from pathlib import Path

from . import parts
from .layout import DAEMON_UID, NODE_UID, REPOSITORY, SEALER_UID, suffix
from .process import Failure
from .slurm import write

# What cargo builds → what a cluster calls it.
PRODUCTS = {
    "berthd": "berthd",
    "berth": "berth",
    "berth-convert": "berth-convert",
    "berth-runtime": "berth-runtime",
    "berth-fuse": "berth-fuse",
    "berth-guard": "berth-guard",
    "berth-node": "berth-node",
    "libspank_berth.so": "spank_berth.so",
}


def build_folder():
    """$BERTH_BIN_DIR, else the release build where it is whole, else the debug build."""
    chosen = os.environ.get("BERTH_BIN_DIR")
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    candidates = [Path(chosen)] if chosen else [target / "release", target / "debug"]
    for folder in candidates:
        missing = [name for name in PRODUCTS if not (folder / name).exists()]
        if not missing:
            return folder
    raise Failure(f"not built in {candidates[-1]}: {', '.join(missing)}", hint="scripts/build")


def install(layout):
    """Copies what is newer, and writes key, store and configuration where they are not there yet."""
    source = build_folder()
    changed = set()
    for name, installed in PRODUCTS.items():
        if copy_if_newer(source / name, layout.path("bin", installed)):
            changed.add(installed)
    for number in layout.daemons:
        write(layout.daemon_config(number), toml(layout, number))
    make_key(layout)
    make_store(layout)
    if changed & {"berthd", "berth-convert"}:
        for part in (*parts.berthds(layout), parts.sealer(layout)):
            part.stop()
    if changed & {"berth-node"}:
        parts.node(layout).stop()
    if changed & {"berth-runtime"}:
        parts.standby(layout).stop()


def start(layout):
    ours = (parts.sealer(layout), *parts.berthds(layout), parts.node(layout), parts.standby(layout))
    return [part.name for part in ours if part.start()]


def copy_if_newer(source, target):
    facts = source.stat()
    if target.exists():
        there = target.stat()
        if there.st_size == facts.st_size and there.st_mtime_ns == facts.st_mtime_ns:
            return False
    part = target.with_name(target.name + ".part")
    shutil.copyfile(source, part)
    os.chmod(part, 0o755)
    os.utime(part, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    part.rename(target)
    return True


def make_key(layout):
    """The site's Ed25519 key: the private half for the sealer alone, the public half root's, for the nodes."""
    private, public = layout.path("sealer", "site.key"), layout.path("etc", "site.pub")
    if private.exists() and public.exists():
        return
    old = os.umask(0o077)
    try:
        run("openssl", "genpkey", "-algorithm", "ed25519", "-out", str(private))
    finally:
        os.umask(old)
    os.chown(private, SEALER_UID, SEALER_UID)
    run("openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public))
    os.chmod(public, 0o644)


def make_store(layout):
    if layout.path("store", "FORMAT").exists():
        return
    run(layout.path("bin", "berth"), "--config", layout.path("etc", "berth.toml"), "store", "init", uid=SEALER_UID)


def toml(layout, number=1):
    """berth.toml: paths below the cluster's folder, defaults for all else, then what the caller asked for. A daemon with
    another number has a state, a socket and a port of its own."""
    path = layout.path
    sections = {
        "": {"default_registry": layout.registry},
        "store": {"path": path("store")},
        "daemon": {"state_dir": path(f"daemon{suffix(number)}")},
        "api": {"socket": layout.daemon_socket(number), "listen": f"127.0.0.1:{layout.daemon_port(number)}",
                "munge_socket": layout.munge_socket},
        "seal": {"key": path("sealer", "site.key"), "socket": path("run", "sealer", "seal.sock"),
                 "state_dir": path("sealer"), "allow_uids": [DAEMON_UID], "spawn": False},
        f'registry."{layout.registry}"': {"plain_http": True},
        # Registries of tests and benchmarks, and the proxies before them, come and go on this machine's ports.
        "policy": {"networks": ["127.0.0.0/8"]},
        "node": {"keys": [path("etc", "site.pub")], "run_dir": path("run", "node")},
        "node.service": {"socket": layout.node_socket, "user": str(NODE_UID), "cache_dir": path("cache")},
    }
    prefix = layout.choices["slurm"]
    if prefix != "/usr":
        sections["node.slurm"] = {"bin_dir": f"{prefix}/bin", "lib_dir": f"{prefix}/lib/slurm"}
    if len(layout.daemons) > 1:
        sections["api"]["url"] = [layout.daemon_url(number) for number in layout.daemons]
    for address in layout.choices["plain_registries"]:
        sections[f'registry."{address}"'] = {"plain_http": True}
    lines = {name: {key: toml_value(value) for key, value in keys.items()} for name, keys in sections.items()}
    for setting in layout.choices["berth_toml"]:
        key, equals, value = setting.partition("=")
        section, _, name = key.strip().rpartition(".")
        if not equals or not name:
            raise Failure(f"not a setting: '{setting}'", hint="--berth-toml node.wait_s=20")
        lines.setdefault(section, {})[name] = value.strip()
    text = "# Written by scripts/cluster.\n"
    for name, keys in lines.items():
        text += f"\n[{name}]\n" if name else ""
        text += "".join(f"{key} = {value}\n" for key, value in keys.items())
    return text


def toml_value(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def run(*argv, uid=None):
    user = {"user": uid, "group": uid, "extra_groups": []} if uid else {}
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False, cwd="/", **user)
    if done.returncode != 0:
        raise Failure(f"'{' '.join(str(word) for word in argv)}' failed: {(done.stderr or done.stdout).strip()}")
