"""Gradient descent computed another way: NumPy, float64, nothing of the package. Rows go in, parameters come out.

Legend: `n` rows, `d` features, `P` parameters (weights, then the bias).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

_WORD = 2**64 - 1


def _finalised(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def permutation(size: int, *key: int) -> list[int]:
    """The permutation of `range(size)` that `key` chooses: a Feistel network of 6 rounds, in Python's own integers."""
    golden, chosen = 0x9E3779B97F4A7C15, 0
    for word in key:
        chosen = _finalised(((chosen ^ word) + golden) & _WORD)
    half = max(1, math.ceil((size - 1).bit_length() / 2))

    def walk(value: int) -> int:
        left, right = value >> half, value % 2**half
        for round_ in range(1, 7):
            left, right = right, left ^ (_finalised((right + chosen + golden * round_) & _WORD) % 2**half)
        return (left << half) | right

    images = []
    for value in range(size):
        value = walk(value)
        while value >= size:
            value = walk(value)
        images.append(value)
    return images


def batches(n: int, batch_size: int, *, shuffle: str, seed: int, window: int = 2**18) -> Iterator[np.ndarray]:
    """Row numbers of one batch after the other, for ever; the last batch of an epoch may be short."""
    size, epoch = min(batch_size, n), 0
    while True:
        rows, numbers = np.arange(n), range(math.ceil(n / size))
        if shuffle == "batches":
            numbers = permutation(len(numbers), seed, epoch, 2)
        if shuffle == "rows":
            starts = range(0, n, window)
            pieces = [
                start + np.array(permutation(len(range(n)[start : start + window]), seed, epoch, 1, start // window))
                for start in (starts[w] for w in permutation(len(starts), seed, epoch, 0))
            ]
            rows = np.concatenate(pieces)
        for number in numbers:
            yield rows[number * size : (number + 1) * size]
        epoch += 1


# residual -> (loss, its derivative)
LOSSES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "squared": lambda r: (r**2, 2 * r),
    "absolute": lambda r: (abs(r), np.sign(r)),
    "huber": lambda r: (np.where(abs(r) <= 1, np.clip(r, -1, 1) ** 2 / 2, abs(r) - 0.5), np.clip(r, -1, 1)),
}


class Rule:
    """An update rule with its memory, as the papers write it.

    Args:
        name: sgd, momentum, nesterov or adam.
        rate: learning rate.
        size: `P`.
        mu: momentum.
        betas: decays of adam's moments.
        epsilon: of adam.
    """

    def __init__(
        self, name: str, rate: float, size: int, *, mu: float = 0.9, betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-7,
    ):  # fmt: skip
        self.name, self.rate, self.mu, self.betas, self.epsilon = name, rate, mu, betas, epsilon
        self.first, self.second, self.step = np.zeros(size), np.zeros(size), 0

    def __call__(self, theta: np.ndarray, g: np.ndarray) -> np.ndarray:
        self.step += 1
        if self.name == "sgd":
            return theta - self.rate * g
        if self.name == "adam":
            b1, b2 = self.betas
            self.first = b1 * self.first + (1 - b1) * g
            self.second = b2 * self.second + (1 - b2) * g**2
            rate = self.rate * math.sqrt(1 - b2**self.step) / (1 - b1**self.step)
            return theta - rate * self.first / (np.sqrt(self.second) + self.epsilon)
        self.first = self.mu * self.first - self.rate * g
        if self.name == "nesterov":
            return theta + self.mu * self.first - self.rate * g
        return theta + self.first


def descend(
    theta: np.ndarray,
    rows: Iterable[Sequence[np.ndarray]],
    rule: Rule,
    *,
    loss: str = "squared",
    l2: float = 0.0,
    steps: int,
) -> Iterator[tuple[float, np.ndarray]]:
    """`(loss, parameters)` before each of `steps` updates, and after the last.

    Args:
        theta: float64 `[d + 1]`.
        rows: `(x [k, d], y [k][, w [k]])` for one update after the other, and one more for the last loss.
        rule: the update rule.
        loss: squared, absolute or huber.
        l2: of the penalty, which leaves the bias alone.
        steps: how many.
    """
    flat = np.append(np.ones(len(theta) - 1), 0.0)
    for _, (x, y, *weights) in zip(range(steps + 1), rows, strict=False):
        w = weights[0] if weights else np.ones(len(y))
        losses, slopes = LOSSES[loss](x @ theta[:-1] + theta[-1] - y)
        yield float(w @ losses / w.sum()), theta
        gradient = np.append((w * slopes) @ x, w @ slopes) / w.sum() + 2 * l2 * flat * theta
        theta = rule(theta, gradient)


def first_difference(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], *, relative: float) -> str:
    """Empty, or `diverged at step n: ...`, where parameters first part by more than `relative` of the largest."""
    assert len(found) >= len(wanted), f"{len(found)} steps instead of {len(wanted)}"
    for step, (a, b) in enumerate(zip(found, wanted, strict=False)):
        apart = np.abs(np.asarray(a) - b).max() / np.abs(b).max()
        if not apart <= relative:
            return f"diverged at step {step}: {np.asarray(a)} instead of {b}, {apart:.3g} apart"
    return ""
