"""JAX: one jitted program with a `fori_loop` over the steps, losses kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peer import RATE, Work, make_rows, starts

VERSION = f"jax {jax.__version__}"


def make(task: dict[str, Any]) -> Work:
    return _fresh(task) if task["kind"] == "fresh" else _descend(task)


def _loss(theta: tuple[Any, Any], x: Any, y: Any) -> Any:
    w, b = theta
    r = (x * w if x.ndim == 1 else x @ w) + b - y
    return jnp.mean(r * r)


def _update(theta: tuple[Any, Any], x: Any, y: Any) -> tuple[Any, Any]:
    loss, gradient = jax.value_and_grad(_loss)(theta, x, y)
    return jax.tree.map(lambda value, g: value - RATE * g, theta, gradient), loss


def _descend(task: dict[str, Any]) -> Work:
    n, d, batch, steps = task["n"], task["d"], task.get("batch", task["n"]), task["steps"]
    x, y = (jnp.asarray(column) for column in make_rows(n, d))
    firsts = jnp.asarray(starts(n, batch, steps))

    @jax.jit
    def loop(theta: Any, x: Any, y: Any, firsts: Any) -> Any:
        def body(step: Any, carry: Any) -> Any:
            theta, losses = carry
            if batch == n:
                xs, ys = x, y
            else:
                xs = jax.lax.dynamic_slice_in_dim(x, firsts[step], batch)
                ys = jax.lax.dynamic_slice_in_dim(y, firsts[step], batch)
            theta, loss = _update(theta, xs, ys)
            return theta, losses.at[step].set(loss)

        return jax.lax.fori_loop(0, steps, body, (theta, jnp.zeros(steps, jnp.float32)))

    zero = jnp.float32(0) if d == 1 else jnp.zeros(d, jnp.float32)

    def run() -> dict[str, Any]:
        theta, losses = jax.block_until_ready(loop((zero, jnp.float32(0)), x, y, firsts))
        return {"weight": float(np.ravel(theta[0])[0]), "loss": float(losses[-1])}

    return Work(run)


def _fresh(task: dict[str, Any]) -> Work:
    """Mini-batches of new rows, made by JAX's own generator a superbatch at a time within the program."""
    batch, steps = task["batch"], task["steps"]
    per_call = max(1, min(steps, 2**17 // batch))

    @jax.jit
    def loop(theta: Any, key: Any) -> Any:
        def superbatch(number: Any, theta: Any) -> Any:
            z = jax.random.normal(jax.random.fold_in(key, number), (2, per_call, batch), jnp.float32)
            x, y = z[0], 9 * z[0] - 2 + z[1]
            return jax.lax.fori_loop(0, per_call, lambda i, theta: _update(theta, x[i], y[i])[0], theta)

        return jax.lax.fori_loop(0, steps // per_call, superbatch, theta)

    key = jax.random.key(0)

    def run() -> dict[str, Any]:
        theta = jax.block_until_ready(loop((jnp.float32(0), jnp.float32(0)), key))
        return {"weight": float(theta[0])}

    return Work(run, scale=steps / (steps // per_call * per_call))
