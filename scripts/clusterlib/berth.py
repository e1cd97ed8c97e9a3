"""Berth's own parts of a cluster: binaries, berth.toml, the site's key, the store."""

from . import parts


def install(layout):
    raise NotImplementedError


def start(layout):
    return [part.name for part in (parts.sealer(layout), parts.berthd(layout)) if part.start()]
