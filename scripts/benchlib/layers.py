"""Images as the conversion benchmark needs them: flattened, and split into other layers. Kept below target/images."""

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from .clusters import ROOT
from .measure import say

IMAGES = ROOT / "target" / "images"


def demo_image(name):
    """The OCI layout of one of scripts/demo-image's images."""
    subprocess.run([ROOT / "scripts" / "demo-image", name], check=True, stdout=subprocess.DEVNULL)
    return IMAGES / name


def manifest(image):
    index = json.loads((image / "index.json").read_text())
    return json.loads(blob(image, index["manifests"][0]["digest"]).read_text())


def blob(image, digest):
    return image / "blobs" / digest.replace(":", "/")


def blobs(image):
    """The layers' files, base first."""
    return [blob(image, layer["digest"]) for layer in manifest(image)["layers"]]


def flatten(image, bundle):
    subprocess.run(["umoci", "unpack", "--image", f"{image}:1", bundle], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def flattened(image):
    """The tree of an image as one tar file, by parallel gzip; made once."""
    target = IMAGES / f"{image.name}.tar.gz"
    if not target.exists():
        say(f"making {target.name}: the tree of {image.name}")
        with tempfile.TemporaryDirectory(prefix=".work.", dir=IMAGES) as work:
            flatten(image, f"{work}/flat")
            plain = Path(work, "flat.tar")
            subprocess.run(["tar", "-C", f"{work}/flat/rootfs", "-cf", plain, "."], check=True)
            subprocess.run(["pigz", plain], check=True)
            Path(work, "flat.tar.gz").rename(target)
    return target


def split(image, count):
    """The flattened tree of an image in `count` gzip layers of about the same size; made once."""
    target = IMAGES / f"{image.name}-{count}"
    if (target / "index.json").exists():
        return target
    whole = flattened(image)
    say(f"making {target.name}: the tree of {image.name} in {count} layers")
    with tempfile.TemporaryDirectory(prefix=".work.", dir=IMAGES) as work:
        layout = Path(work, "oci")
        write_layout(whole, layout, count)
        layout.rename(target)
    return target


def write_layout(whole, layout, count):
    """The members of a tar file, in their order, as an image of several layers cut by size."""
    (layout / "blobs" / "sha256").mkdir(parents=True)
    with tarfile.open(whole) as tar:
        # A header, contents, padding.
        total = sum(1024 + member.size for member in tar)
    written, layers, out = 0, [], None
    with tarfile.open(whole, "r|gz") as tar:
        for member in tar:
            if written * count >= total * len(layers):
                if out:
                    out.end()
                out = Layer(layout)
                layers.append(out)
            written += 1024 + member.size
            out.tar.addfile(member, tar.extractfile(member) if member.isreg() else None)
    out.end()
    config = put(layout, json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {
        "type": "layers", "diff_ids": [layer.diff_id for layer in layers]}}).encode())
    media = "application/vnd.oci.image"
    entry = put(layout, json.dumps({
        "schemaVersion": 2, "mediaType": f"{media}.manifest.v1+json",
        "config": {"mediaType": f"{media}.config.v1+json", **config},
        "layers": [{"mediaType": f"{media}.layer.v1.tar+gzip", **layer.descriptor} for layer in layers],
    }).encode())
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [{
        "mediaType": f"{media}.manifest.v1+json", **entry,
        "annotations": {"org.opencontainers.image.ref.name": "1"}}]}))


class Layer:
    """A layer that is being written: `tar`, then `end`, then its descriptor and diff_id."""

    def __init__(self, layout):
        self.layout = layout
        self.packed = layout / "layer.tar.gz"
        self.hash = hashlib.sha256()
        with open(self.packed, "wb") as packed:
            self.pigz = subprocess.Popen(["pigz"], stdin=subprocess.PIPE, stdout=packed)
        self.tar = tarfile.open(mode="w|", fileobj=self, format=tarfile.PAX_FORMAT)

    def write(self, content):
        self.hash.update(content)
        return self.pigz.stdin.write(content)

    def end(self):
        self.tar.close()
        self.pigz.communicate()
        self.diff_id = f"sha256:{self.hash.hexdigest()}"
        digest = hash_of(self.packed)
        self.descriptor = {"digest": digest, "size": self.packed.stat().st_size}
        self.packed.rename(blob(self.layout, digest))


def hash_of(path):
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def put(layout, content):
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    blob(layout, digest).write_bytes(content)
    return {"digest": digest, "size": len(content)}


def find(record, name):
    """The first object of this name anywhere in a record."""
    if isinstance(record, dict):
        if isinstance(record.get(name), dict):
            return record[name]
        record = list(record.values())
    if isinstance(record, list):
        for inner in record:
            found = find(inner, name)
            if found is not None:
                return found
    return None
