"""The benchmark suite: `scripts/bench.sh` runs it, `tests/repository/test_bench.py` keeps it from rotting.

    python scripts/bench/suite.py run [--quick] [--only=ROW ...] [--peers_python=PATH] [--output=FILE.jsonl]
    python scripts/bench/suite.py render FILE.jsonl [--into=FOLDER]

`run` measures every row side by side with its peers, writes a JSON line per measurement and prints a table; `render`
makes the dated document, the plot and the section of `docs/benchmarks.md` of them.
"""

from __future__ import annotations

import argparse
import datetime as dt
import fnmatch
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import machine
import table
from comparison import OLDER_COMMIT, TAPEDIST, Contestant, Row
from drivers import HERE, Driver, LimitDriver, Missing, PeerDriver, PeerProcess, ProcessDriver, compile_limit, unpacked
from measure import measure_row
from workloads import rows_of

_OLDER = "tapedist_0_1"
_OWN = (TAPEDIST, _OLDER, "tensorflow", "numpy")  # Peers that tapedist's own interpreter has in any case.


class Stage:
    """Starts peers as rows ask for them, and keeps them.

    Args:
        peers_python: the interpreter of the other peers.
        folder: for the compiled program.
    """

    def __init__(self, peers_python: str, folder: pathlib.Path, tell: Callable[[dict[str, Any]], None]):
        self._python = peers_python
        self._folder = folder
        self._tell = tell
        self._peers: dict[str, PeerProcess | Missing] = {}
        self._limit: pathlib.Path | Missing | None = None

    def driver(self, contestant: Contestant, *, warm: bool) -> Driver:
        """The driver of a contestant.

        Raises:
            Missing: if its framework, or the compiler, is not here.
        """
        kind, _, package = contestant.runs_in.partition("/")
        if kind == "process":
            words = [
                word.replace("{here}", str(HERE)).replace("{folder}", str(self._folder)) for word in contestant.task
            ]
            return ProcessDriver(words, warm=warm, package=self._older() if package == _OLDER else None)
        if contestant.runs_in == "limit":
            threads, words = contestant.task
            return LimitDriver(self._compiled(), words, threads=threads or machine.cores())
        task = json.loads(json.dumps(contestant.task).replace("{folder}", str(self._folder)))
        return PeerDriver(self._peer(contestant.runs_in), contestant.name, task)

    def _peer(self, name: str) -> PeerProcess:
        if name not in self._peers:
            module, _, words = name.partition("/")
            python = sys.executable if module in _OWN else self._python
            try:
                package = self._older() if module == _OLDER else None
                self._peers[name] = PeerProcess(python, [f"peer_{module}", *words.split()], package=package)
            except Missing as reason:
                self._peers[name] = reason
            else:
                self._tell({"kind": "peer", "peer": name, "version": self._peers[name].version})
        found = self._peers[name]
        if isinstance(found, Missing):
            raise found
        return found

    def _compiled(self) -> pathlib.Path:
        if self._limit is None:
            try:
                self._limit = compile_limit(self._folder)
            except Missing as reason:
                self._limit = reason
        if isinstance(self._limit, Missing):
            raise self._limit
        return self._limit

    def _older(self) -> pathlib.Path:
        """Where the package of version 0.1 is."""
        folder = self._folder / _OLDER
        return folder if (folder / TAPEDIST).exists() else unpacked(OLDER_COMMIT, folder)

    def close(self) -> None:
        for peer in self._peers.values():
            if isinstance(peer, PeerProcess):
                peer.close()


def run(arguments: argparse.Namespace) -> int:
    rows = rows_of(quick=arguments.quick)
    wanted = [row for row in rows if not arguments.only or any(fnmatch.fnmatch(row.name, o) for o in arguments.only)]
    if not wanted:
        print(f"--only={arguments.only}: no such row; there are {', '.join(row.name for row in rows)}", file=sys.stderr)
        return 2
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    with open(arguments.output, "w", encoding="utf-8") as file:

        def tell(record: dict[str, Any]) -> None:
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            if record["kind"] == "skipped":
                print(f"skipped: {record['contestant']} in {record['row']} ({record['reason']})", flush=True)

        # Paths as they are in the repository: where it lies is nobody's business.
        command = [word.replace(f"{HERE.parents[1]}/", "") for word in sys.argv]
        tell({"kind": "machine", "quick": arguments.quick, "command": command} | machine.describe())
        _run_rows(wanted, arguments, tell)
    for row in wanted:
        table.show(row, records)
    print(f"\nMeasurements: {arguments.output}")
    return 0


def _run_rows(rows: list[Row], arguments: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    rounds = arguments.rounds or (1 if arguments.quick else 7)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(arguments.peers_python, pathlib.Path(folder), tell)
        try:
            for row in rows:
                print(f"{dt.datetime.now():%H:%M:%S} {row.name}: {row.title}", file=sys.stderr, flush=True)
                drivers: dict[str, Driver] = {}
                for contestant in row.contestants:
                    try:
                        drivers[contestant.name] = stage.driver(
                            contestant, warm=row.name != "billion" and not arguments.quick
                        )
                    except Missing as reason:
                        tell({"kind": "skipped", "row": row.name, "contestant": contestant.name, "reason": str(reason)})
                measure_row(row, drivers, rounds=min(rounds, row.rounds or rounds), tell=tell)
        finally:
            stage.close()


def render(arguments: argparse.Namespace) -> int:
    import document

    with open(arguments.file, encoding="utf-8") as file:
        records: list[Mapping[str, Any]] = [json.loads(line) for line in file]
    for path in document.write(records, arguments.into, source=arguments.file):
        print(path)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure")
    runs.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    runs.add_argument("--only", action="append", default=[], metavar="ROW", help="a row, or a pattern such as curve_*")
    runs.add_argument("--rounds", type=int, default=0, help="turns per contestant; by default 7")
    runs.add_argument("--peers_python", default=os.environ.get("TAPEDIST_PEERS_PYTHON", sys.executable))
    stamp = f"{dt.date.today():%Y-%m-%d}"
    runs.add_argument("--output", type=pathlib.Path, default=HERE / "results" / f"{stamp}.jsonl")
    renders = commands.add_parser("render", help="make the document, the plot and the section of docs/benchmarks.md")
    renders.add_argument("file", type=pathlib.Path)
    renders.add_argument("--into", type=pathlib.Path, default=HERE / "results")
    arguments = parser.parse_args()
    return {"run": run, "render": render}[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
