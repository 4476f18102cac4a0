"""`tapedist doctor`: what is here, does it work, what to fix; one line per check."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from tapedist.cluster import checks
from tapedist.cluster.checks import Check, Findings
from tapedist.options import RANK, Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(Options):
    """Settings of `tapedist doctor`.

    Raises:
        InputError: if a field is invalid.
    """

    run_dir: str = option("", "The folder that a run would be kept in; empty checks this folder.", path=True)
    workers: tuple[str, ...] = option((), "Addresses of all processes, host:port each, in rank order.")
    worker_index: int = option(-1, "This process's place in --workers; -1 where it has none.", rule=RANK)


def run_checks(config: DoctorConfig, environ: Mapping[str, str]) -> Iterator[Check]:
    """The checks in order, each as soon as it is known."""
    yield checks.python()
    findings: Findings = checks.probe_devices()
    yield checks.tensorflow(findings)
    yield checks.devices(findings)
    yield checks.gpu_libraries(findings)
    yield checks.tpu(findings, environ)
    yield checks.cluster(environ, config.workers, None if config.worker_index < 0 else config.worker_index)
    yield checks.run_dir(config.run_dir or ".")
    yield checks.exchange()
    yield checks.speed(findings)


def main(
    config: DoctorConfig,
    *,
    environ: Mapping[str, str] = os.environ,
    run: Callable[[DoctorConfig, Mapping[str, str]], Iterator[Check] | Sequence[Check]] = run_checks,
    out: TextIO | None = None,
) -> int:
    """Prints every check on its own line.

    Returns:
        0 if nothing failed, else 2.
    """
    out = out or sys.stdout
    failed = 0
    for check in run(config, environ):
        failed += check.status == "failed"
        print(check.line(), file=out, flush=True)
    return 2 if failed else 0
