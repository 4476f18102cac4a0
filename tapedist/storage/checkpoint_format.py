"""The bytes of a checkpoint's two files: pure functions between content and bytes.

`state.npz` is an uncompressed NumPy archive without pickles. `manifest.json` is JSON in one canonical form that ends
with its own SHA-256, so that decoding notices every changed byte, even one that would not change its meaning.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

SCHEMA = 2
STATE = "state.npz"
MANIFEST = "manifest.json"


class Rejected(Exception):
    """The reason why a stored file cannot be used."""


class NewerSchema(Rejected):
    """A sound manifest of a later version."""


class OlderSchema(Rejected):
    """A sound manifest of version 0.1, whose sums were different."""


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Packs little-endian arrays into an `.npz` whose bytes do not depend on their order or the clock.

    Raises:
        ValueError: if an array holds Python objects.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            array = np.asarray(arrays[name], order="C")
            member = io.BytesIO()
            np.lib.format.write_array(member, array.astype(array.dtype.newbyteorder("<")), allow_pickle=False)
            # `np.savez` would write the time of day into each entry.
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # The same on every platform.
            archive.writestr(entry, member.getvalue())
    return buffer.getvalue()


def unpack_arrays(state: bytes) -> dict[str, np.ndarray]:
    """Unpacks what `pack_arrays` packed.

    Raises:
        Rejected: if `state` is no archive of plain arrays.
    """
    try:
        with np.load(io.BytesIO(state), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # For damaged bytes, numpy and zipfile raise exceptions of many kinds.
        raise Rejected(f"{STATE} does not hold plain arrays ({type(error).__name__})") from None


def encode_manifest(*, serial: int, step: int, state: bytes, meta: Mapping[str, Any], schema: int = SCHEMA) -> bytes:
    """Encodes the manifest of a checkpoint.

    Args:
        serial: the save's number.
        step: updates done.
        state: the bytes of `state.npz`.
        meta: the caller's content, as JSON.
        schema: the version of this format.

    Raises:
        ValueError, TypeError: if `meta` holds what JSON does not (NaN is not JSON).
    """
    stored = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    return _sealed({"schema": schema, "serial": serial, "step": step, "files": {STATE: stored}, "meta": dict(meta)})


def decode_manifest(data: bytes) -> dict[str, Any]:
    """Decodes a manifest.

    Raises:
        NewerSchema: if it is sound, of a schema above `SCHEMA`.
        OlderSchema: if it is sound, of a schema below `SCHEMA`.
        Rejected: if a byte differs from what `encode_manifest` writes, or a field is missing or of the wrong type.
    """
    try:
        body = json.loads(data)
        # Encoded again and compared, which checks the digest and the spelling of every byte at once.
        body.pop("sha256")
        intact = _sealed(body) == data
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise Rejected(f"{MANIFEST} is damaged")
    match body:
        case {"schema": int(schema)} if schema > SCHEMA:
            raise NewerSchema(f"{MANIFEST} has schema {schema}, this version knows up to {SCHEMA}")
        case {
            "schema": (1 | 2) as schema,
            "serial": int(),
            "step": int(),
            "meta": dict(),
            "files": {"state.npz": {"size": int(), "sha256": str()}},
        }:
            if schema < SCHEMA:
                raise OlderSchema("was saved by version 0.1, whose arithmetic was another")
            return dict(body)
    raise Rejected(f"{MANIFEST} lacks a field")


def check_state(state: bytes, manifest: Mapping[str, Any]) -> None:
    """Checks the bytes of `state.npz` against a decoded manifest.

    Raises:
        Rejected: if they differ from those it was written for.
    """
    stored = manifest["files"][STATE]
    if len(state) != stored["size"]:
        raise Rejected(f"{STATE} has {len(state)} bytes instead of {stored['size']}")
    if hashlib.sha256(state).hexdigest() != stored["sha256"]:
        raise Rejected(f"the SHA-256 of {STATE} is not the one in {MANIFEST}")


def _sealed(body: Mapping[str, Any]) -> bytes:
    """The canonical JSON of `body`, with the SHA-256 of the canonical JSON without it as the last key."""

    def spelled(content: Mapping[str, Any]) -> bytes:
        return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"

    return spelled({**body, "sha256": hashlib.sha256(spelled(body)).hexdigest()})
