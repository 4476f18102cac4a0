"""Probing ports, against real sockets."""

import contextlib
import socket
import subprocess
import sys

import pytest

from tapedist.cluster.network import PortReservation, check_own_port, port_in_use, unreachable
from tapedist.errors import InputError


@contextlib.contextmanager
def listening(host="127.0.0.1", port=0):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen()
        yield server.getsockname()[1]


def free_port() -> int:
    reservation = PortReservation(1)
    reservation.close()
    return reservation.ports[0]


def test_unreachable_keeps_the_order_and_names_only_the_silent():
    with listening() as first, listening() as second:
        silent = [f"127.0.0.1:{free_port()}", f"localhost:{free_port()}"]
        addresses = [silent[1], f"127.0.0.1:{first}", silent[0], f"localhost:{second}"]
        assert unreachable(addresses, timeout_secs=5) == [silent[1], silent[0]]


def test_unreachable_of_nothing():
    assert unreachable([], timeout_secs=1) == []


def test_an_unknown_host_is_unreachable():
    assert unreachable(["no-such-host.invalid:1"], timeout_secs=1) == ["no-such-host.invalid:1"]


def test_unreachable_refuses_a_bad_address():
    with pytest.raises(InputError, match="has no port"):
        unreachable(["host"], timeout_secs=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_port_in_use(host):
    with listening(host) as port:
        assert port_in_use(f"somewhere:{port}")
        with pytest.raises(InputError, match=f"port {port} of this machine is in use"):
            check_own_port(f"127.0.0.1:{port}")
    assert not port_in_use(f"somewhere:{port}")
    check_own_port(f"127.0.0.1:{port}")


def test_port_in_use_on_ipv6_only():
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with listening("::1") as port:
        assert port_in_use(f"[::1]:{port}")


def test_port_in_use_refuses_a_bad_address():
    with pytest.raises(InputError, match="has no port"):
        port_in_use("host")


def test_check_own_port_of_a_lone_process():
    check_own_port("")


def test_lingering_connections_do_not_count():
    with listening() as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.close()
    assert not port_in_use(f"127.0.0.1:{port}")


def test_reserved_ports_are_different_free_for_a_server_and_closed_to_chance():
    reservation = PortReservation(8)
    try:
        assert len(set(reservation.ports)) == 8
        port = reservation.ports[0]
        assert not port_in_use(f"127.0.0.1:{port}")
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        server = (
            "import socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1);"
            "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen()"
        )
        assert subprocess.run([sys.executable, "-c", server, str(port)], check=False).returncode == 0
    finally:
        reservation.close()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port))
