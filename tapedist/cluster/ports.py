"""Where this process really listens, as the kernel tells it. Pure and TensorFlow-free."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import sys

_LISTEN = "0A"


def listening(port: int) -> list[str]:
    """Local addresses `host:port` on which this process listens at `port`; empty where the system does not tell.

    Reads `/proc/net/tcp` and `/proc/net/tcp6` (Linux, `man 5 proc`): the address in hexadecimal, each group of four
    bytes in the machine's byte order, the state (0A is LISTEN), and the socket's inode.
    """
    own, found = _own_sockets(), []
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/net/{name}", encoding="ascii") as file:
                rows = [line.split() for line in file][1:]
        except OSError:
            continue
        for row in rows:
            host, _, hex_port = row[1].partition(":")
            if row[3] == _LISTEN and int(hex_port, 16) == port and row[9] in own:
                found.append(_address(host, port))
    return sorted(set(found))


def _own_sockets() -> set[str]:
    """Inodes of this process's sockets."""
    inodes = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # It was closed meanwhile.
                match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/self/fd/{name}"))
                if match:
                    inodes.add(match[1])
    return inodes


def _address(host: str, port: int) -> str:
    words = [bytes.fromhex(host[i : i + 8]) for i in range(0, len(host), 8)]
    raw = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    ip = ipaddress.ip_address(raw)
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"


def exposure(rank: int, address: str) -> str:
    """One line that says where rank `rank`, told to use `address`, can be reached and by whom."""
    port = int(address.rpartition(":")[2])
    bound = listening(port)
    everywhere = not bound or any(one.startswith(("[::]:", "0.0.0.0:")) for one in bound)
    where = "open on all interfaces and unauthenticated" if everywhere else "unauthenticated"
    return (
        f"worker {rank} listens at {', '.join(bound) or f'port {port}'}: {where}; let only the other workers reach it, "
        "by a firewall or a network of its own"
    )
