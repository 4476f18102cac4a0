"""The constants of the cost model, read off the measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from measure import Summary
from table import rate_text, seconds_text

Found = Mapping[str, Mapping[str, Summary]]


def constants(machine: Mapping[str, Any], found: Found) -> dict[str, str]:
    """Placeholder -> text; what was not measured is left out."""
    values = {
        "date": str(machine["date"]).split()[0],
        "processor": machine["processor"],
        "cores": str(machine["cores"]),
    }
    values |= _process(found) | _rates(found) | _loops(found) | _growth(found)
    return values


def _median(found: Found, row: str, contestant: str) -> float | None:
    one = found.get(row, {}).get(contestant)
    return one.median if one else None


def _texts(pairs: Mapping[str, float | None]) -> dict[str, str]:
    return {key: seconds_text(value) for key, value in pairs.items() if value is not None}


def _process(found: Found) -> dict[str, str]:
    startup = found.get("startup", {}).get("tapedist")
    values = _texts(
        {
            "import_tensorflow": _median(found, "tutorial_process", "import tensorflow"),
            "tutorial_process": _median(found, "tutorial_process", "tapedist"),
            "billion": _median(found, "billion", "tapedist"),
        }
    )
    if startup:
        phases = startup.outcome
        values["startup_table"] = "\n".join(
            f"| {name} | {seconds_text(spent)} |" for name, spent in phases.items() if " " in name
        )
        values["set_up"] = seconds_text(phases["train, all of it"])
    billion = found.get("billion", {}).get("tapedist")
    if billion:
        values["billion_memory"] = f"{billion.outcome['peak_mib']:.0f} MiB"
    return values


def _largest(found: Found, contestant: str) -> float | None:
    """The contestant's best rate on the curve."""
    rates = [row[contestant].rate for name, row in found.items() if name.startswith("curve") and contestant in row]
    return max(rates, default=None)


def _rates(found: Found) -> dict[str, str]:
    named = {
        "rate_cached": "stream, cached",
        "rate_streamed": "stream, streamed",
        "rate_moments": "moments, the pass",
        "rate_fresh": "mini batch, new rows",
    }
    rates = {key: _largest(found, contestant) for key, contestant in named.items()}
    texts = {key: rate_text(rate, "rows") for key, rate in rates.items() if rate}
    for key, row in {"rate_wide": "stream_wide", "rate_wide_moments": "moments_64_float64"}.items():
        if "tapedist" in found.get(row, {}):
            texts[key] = rate_text(found[row]["tapedist"].rate, "rows")
    return texts


def _loops(found: Found) -> dict[str, str]:
    epochs = 3000
    stream = _median(found, "tutorial", "tapedist")
    moments = _median(found, "moments_epochs", "tapedist")
    batch = found.get("mini_batch_cached", {}).get("tapedist")
    return _texts(
        {
            "epoch_stream": stream and stream / epochs,
            "epoch_moments": moments and moments / epochs,
            "step_batch": 1 / batch.rate if batch else None,
        }
    )


def _growth(found: Found) -> dict[str, str]:
    lines = []
    for name, row in found.items():
        if name.startswith("sums_") and {"exact", "XLA"} <= set(row):
            _, rows, features = name.split("_")
            exact, plain = row["exact"], row["XLA"]
            ratio = f"{exact.median / plain.median:.2f} x"
            fast = f"{row['fast'].median / plain.median:.2f} x" if "fast" in row else "-"
            step = seconds_text(1 / exact.rate)
            lines.append(f"| {int(rows):,} | {features} | {step} | {ratio} | {fast} |")
    replicas = found.get("replicas", {})
    texts = {name: seconds_text(1 / one.rate) for name, one in replicas.items()}
    return {
        "sums_table": "\n".join(lines),
        "replica_table": "\n".join(f"| {name.removeprefix('R = ')} | {text} |" for name, text in texts.items()),
    }
