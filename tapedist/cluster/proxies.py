"""Workers talk to each other directly: gRPC would ask the proxy that the environment names for the web."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, MutableMapping, Sequence

from tapedist.cluster.resolve import split_address

# gRPC looks at the first of these that is set, and at no other.
_EXEMPTIONS = ("no_grpc_proxy", "no_proxy")


@contextlib.contextmanager
def without_proxy(workers: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """While entered, gRPC uses no proxy for `workers`, `host:port` each; nobody but gRPC reads the variable."""
    name = _EXEMPTIONS[0]
    before = environ.get(name)
    hosts = [split_address(address)[0] for address in workers]
    known = next((environ[name] for name in _EXEMPTIONS if name in environ), "")
    environ[name] = ",".join(dict.fromkeys([*filter(None, known.split(",")), *hosts]))
    try:
        yield
    finally:
        if before is None:
            environ.pop(name, None)
        else:
            environ[name] = before
