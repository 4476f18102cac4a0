"""Each file of configs/ parses, says what it is, and is a small difference from the defaults."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import REPO

from tapedist.config import TrainConfig

CONFIGS = sorted((REPO / "configs").glob("*.flags"))


def test_the_promised_ones_are_there():
    assert {"tutorial", "mini_batch", "million", "virtual_devices", "multi_gpu", "tpu_vm"} <= {p.stem for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path: Path, parse_flags: Callable[[Sequence[str]], TrainConfig]):
    text = path.read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    command = next(line for line in header if line.endswith(f" --flagfile=configs/{path.name}"))
    assert (REPO / re.findall(r"scripts/\S+", command)[0]).is_file()
    assert any(line.startswith("# result: ") for line in header)
    assert any(line.startswith("# time: ") for line in header)

    config = parse_flags([f"--flagfile={path}"])
    assert config.run_dir == f"runs/{path.stem}"
    default = TrainConfig(m=config.m if "--m=" in text else (9.0,) * config.num_features, num_features=len(config.m))
    differing = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(default, f.name)}
    differing |= {"num_features"} if config.num_features > 1 else set()  # Without it, m would not fit.
    said = [line[2:].partition("=")[0] for line in text.splitlines() if line.startswith("--")]
    assert sorted(said) == sorted(differing), "a config says each difference once and repeats no default"
    assert len(said) <= 10


def test_the_tutorial_is_the_defaults(parse_flags: Callable[[Sequence[str]], TrainConfig]):
    tutorial = next(path for path in CONFIGS if path.stem == "tutorial")
    assert parse_flags([f"--flagfile={tutorial}"]) == TrainConfig(run_dir="runs/tutorial")
