"""The ordinary user of the clusters: made when missing, taken back only if made here."""

import pwd
import subprocess

from .layout import CLUSTERS
from .process import Failure

USER = "berth-demo"


def ensure_user():
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        pass
    run = subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", USER],
                         capture_output=True, text=True, check=False)
    if run.returncode not in (0, 9):  # 9: somebody else made it meanwhile
        raise Failure(f"cannot add the user {USER}: {run.stderr.strip()}")
    (CLUSTERS / ".made-user").write_text(f"{USER}\n")
    return pwd.getpwnam(USER)


def drop_user_if_ours():
    """For the last cluster that goes: the user goes with it if it was made for the clusters."""
    note = CLUSTERS / ".made-user"
    if note.exists():
        subprocess.run(["userdel", "--remove", USER], capture_output=True, check=False)
        note.unlink()
