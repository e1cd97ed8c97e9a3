"""Images as the conversion benchmark needs them: flattened, and split into other layers. Kept below target/images."""

import hashlib
import json
import os
import shutil
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
    say(f"making {target.name}: the tree of {image.name} in {count} layers")
    work = Path(tempfile.mkdtemp(prefix=".work.", dir=IMAGES))
    try:
        flatten(image, work / "flat")
        write_layout(work / "flat" / "rootfs", work / "oci", count)
        (work / "oci").rename(target)
    finally:
        shutil.rmtree(work)
    return target


def write_layout(tree, layout, count):
    """Files of the tree, in its order, cut into layers by their sizes. Each layer names the folders it needs."""
    (layout / "blobs" / "sha256").mkdir(parents=True)
    sized, total = [], 0
    for folder, folders, files in os.walk(tree):
        folders.sort()
        for path in (os.path.join(folder, name) for name in sorted([*folders, *files])):
            # A header, padding, and contents.
            total += 1024 + (os.lstat(path).st_size if not os.path.isdir(path) else 0)
            sized.append((path, total))
    parts = [[] for _ in range(count)]
    for path, end in sized:
        parts[min((end - 1) * count // total, count - 1)].append(path)
    entries, diff_ids = [], []
    for part in parts:
        packed, diff_id = layer(tree, part, layout)
        entries.append({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **packed})
        diff_ids.append(diff_id)
    config = put(layout, json.dumps({"architecture": "amd64", "os": "linux", "config": {},
                                     "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode())
    written = put(layout, json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config}, "layers": entries,
    }).encode())
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", **written,
        "annotations": {"org.opencontainers.image.ref.name": "1"}}]}))


def layer(tree, paths, layout):
    """One layer of these paths, and the folders above them; its descriptor and diff_id."""
    plain = layout / "layer.tar"
    seen = set()
    with tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            relative = Path(path).relative_to(tree)
            for above in [*reversed(relative.parents)][1:]:
                if above not in seen:
                    seen.add(above)
                    tar.add(tree / above, arcname=str(above), recursive=False)
            if relative not in seen:
                seen.add(relative)
                tar.add(path, arcname=str(relative), recursive=False)
    diff_id = hash_of(plain)
    subprocess.run(["pigz", "--no-name", plain], check=True)
    packed = plain.with_name("layer.tar.gz")
    digest, size = hash_of(packed), packed.stat().st_size
    packed.rename(blob(layout, digest))
    return {"digest": digest, "size": size}, diff_id


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
