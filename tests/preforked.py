"""Starts of Python with TensorFlow imported already, for tests that need a new process and not its start."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

TESTS = Path(__file__).resolve().parent
_LOCK = threading.Lock()


def preforked_python() -> list[str]:
    """What to put in place of `sys.executable`, before `-c CODE`, `-m MODULE` or a file; see `preforked_server.py`."""
    if sys.platform != "linux":  # Elsewhere system libraries do not bear a fork.
        return [sys.executable]
    with _LOCK:
        return [sys.executable, "-I", "-S", str(TESTS / "preforked_start.py"), _server()]


@functools.cache
def _server() -> str:
    """The socket of this process's server, which ends with this process."""
    folder = tempfile.mkdtemp(prefix="warm-")  # Not pytest's: the path of a socket must be short.
    path = os.pathsep.join(filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]))
    unset = ("XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS")  # tapedist is to set them.
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(TESTS / "preforked_server.py"), f"{folder}/socket"],
        env={**environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    while not os.path.exists(f"{folder}/socket"):
        assert server.poll() is None
        threading.Event().wait(0.01)
    return f"{folder}/socket"
