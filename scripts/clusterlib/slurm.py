"""Slurm's configuration for many nodes on one machine, and questions to a running slurmctld."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

SLURM_CONF = """\
# Written by scripts/cluster: one slurmctld and {nodes} slurmd on this machine.
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# How long credentials live is also how long a requeued job must wait: two minutes by default.
AuthInfo=socket={munge_socket},cred_expire=20
CredType=cred/munge
StateSaveLocation={folder}/slurmctld
SlurmdSpoolDir={folder}/slurmd/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
PlugStackConfig={plugstack}
{task_prolog}
{extra}
# Nothing of the machine's is managed: nodes here are names with ports.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
DebugFlags=NO_CONF_HASH
# salloc refuses --container without it.
LaunchParameters=use_interactive_step
# Start at once, end at once.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=3
MinJobAge=600
SlurmctldTimeout=300
SlurmdTimeout=600
MessageTimeout=60
BatchStartTimeout=60
SlurmctldDebug=info
SlurmdDebug={slurmd_debug}
NodeName={node_list} NodeAddr=127.0.0.1 NodeHostname={host} Port={slurmd_ports} CPUs=16 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def own_path(prefix):
    """Where the programs of a Slurm are that was installed with a prefix; one below /usr is found as all else is."""
    return [] if prefix == "/usr" else [f"{prefix}/bin", f"{prefix}/sbin"]


def search_path(prefix):
    return ":".join([*own_path(prefix), "/usr/sbin", "/usr/bin", "/sbin", "/bin"])


def write_configuration(layout):
    """slurm.conf for everybody, and one more for each node that differs (`--without-plugin NODE`)."""
    choices = layout.choices
    etc = layout.path("etc")
    write(etc / "plugstack.conf", plugstack(layout, str(layout.path("bin", "spank_berth.so"))))
    write(layout.slurm_conf, slurm_conf(layout, etc / "plugstack.conf"))
    # slurmd looks for its cgroup.conf beside slurm.conf; proctrack/linuxproc needs nothing of it.
    write(etc / "cgroup.conf", "CgroupAutomount=no\n")
    for node in choices["without_plugin"]:
        folder = etc / node
        folder.mkdir(exist_ok=True)
        write(folder / "plugstack.conf", plugstack(layout, str(layout.path("bin", "no-such-plugin.so"))))
        write(folder / "slurm.conf", slurm_conf(layout, folder / "plugstack.conf"))
        write(folder / "cgroup.conf", "CgroupAutomount=no\n")


def slurm_conf(layout, plugstack_file):
    choices = layout.choices
    nodes, port = choices["nodes"], choices["slurmd_port"]
    prolog = choices["task_prolog"] or (layout.path("bin", "berth-guard") if choices["berth"] else "none")
    return SLURM_CONF.format(
        name=layout.name,
        host=socket.gethostname().split(".")[0],
        slurmctld_port=choices["slurmctld_port"],
        munge_socket=layout.munge_socket,
        folder=layout.folder,
        plugstack=plugstack_file,
        task_prolog="# no TaskProlog" if prolog == "none" else f"TaskProlog={prolog}",
        extra="\n".join(choices["slurm_conf"]),
        slurmd_debug=choices["slurmd_debug"],
        nodes=nodes,
        node_list="n1" if nodes == 1 else f"n[1-{nodes}]",
        slurmd_ports=str(port) if nodes == 1 else f"[{port}-{port + nodes - 1}]",
    )


def plugstack(layout, plugin):
    choices = layout.choices
    if not choices["berth"] or choices["plugin"] == "none":
        return "# no plugins\n"
    words = [choices["plugin"], plugin, f"runtime={layout.path('bin', 'berth-runtime')}",
             f"config={layout.path('etc', 'berth.toml')}", f"run_dir={layout.path('run', 'node')}",
             f"log={layout.path('log', 'berth-runtime.log')}",
             *choices["plugin_args"]]
    return " ".join(words) + "\n"


def write(path, text):
    """Replaces a file only when it differs: a daemon that watches its time stamp sees no change where none is."""
    if not path.exists() or path.read_text() != text:
        part = path.with_suffix(".part")
        part.write_text(text)
        part.rename(path)


def node_conf(layout, node):
    own = layout.path("etc", node, "slurm.conf")
    return own if node in layout.choices["without_plugin"] else layout.slurm_conf


def ask(layout, *argv, seconds=20):
    """Runs one of Slurm's commands against the cluster; its standard output, or None when it failed."""
    env = {"PATH": search_path(layout.choices["slurm"]), "SLURM_CONF": str(layout.slurm_conf)}
    try:
        run = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None
    return run.stdout if run.returncode == 0 else None


def controller_answers(layout):
    answer = ask(layout, "scontrol", "ping", seconds=5)
    return answer is not None and "is UP" in answer


def nodes_usable(layout):
    """True when every node takes work (idle, or working already)."""
    answer = ask(layout, "sinfo", "--noheader", "--Node", "--format=%T")
    states = (answer or "").split()
    return len(states) == layout.choices["nodes"] and all(s in ("idle", "mixed", "allocated", "completing") for s in states)


def node_states(layout):
    return (ask(layout, "sinfo", "--noheader", "--Node", "--format=%N %T %E") or "").strip()


def missing_programs(prefix):
    wanted = ("slurmctld", "slurmd", "munged", "scontrol", "docker-registry")
    return [name for name in wanted if shutil.which(name, path=search_path(prefix)) is None]
