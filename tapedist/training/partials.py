"""The fixed-order sum: how many shards become one total with the same bits on any number of replicas.

Legend: `V` virtual shards, `R` replicas, `P` parameters. A partial is what one shard contributes: the flat float64
vector `(sum w*loss, sum w, sum w*gradient)` of `P + 2` numbers. Three rules keep the bits:

1. A shard's partial comes from a computation of one fixed shape, whoever runs it (`shard_partials`, `block_partials`).
2. Partials are gathered, which copies bits (`gather`); never added up on the way.
3. Exactly `V` of them are added one after the other, on every replica (`fold`).
"""

from __future__ import annotations

from collections.abc import Callable

import tapedist.numerics  # noqa: F401  (before TensorFlow)
import tensorflow as tf

_UNROLLED_SHARDS = 64


def shard_partials(
    shard_sum: Callable[[tf.Tensor], tf.Tensor], *, first: tf.Tensor, num_shards: int, width: int
) -> tf.Tensor:
    """Partials of a replica's shards, one trip of a compiled loop each.

    XLA inlines a loop of one trip and compiles it differently, so there are always at least two: the caller pads a
    lone shard by an empty one.

    Args:
        shard_sum: `place (int32) -> partial [width]`, traced once.
        first: int32, place of the first shard. The loop carries the place, because XLA would take a start of slices
            that does not change in the loop for a constant, and compile anew for each value.
        num_shards: how many, at least 2.
        width: `P + 2`.

    Returns:
        float64 `[num_shards, width]`.
    """
    assert num_shards >= 2, "a lone shard must be padded by an empty one"

    def body(shard: tf.Tensor, place: tf.Tensor, partials: tf.Tensor) -> tuple[tf.Tensor, ...]:
        partial = shard_sum(place)[tf.newaxis]
        return shard + 1, place + 1, tf.tensor_scatter_nd_update(partials, [[shard]], partial)

    start = (tf.constant(0), first, tf.zeros([num_shards, width], tf.float64))
    return tf.while_loop(lambda shard, *_: shard < num_shards, body, start)[2]


def block_partials(
    block_sum: Callable[[tf.Tensor], tf.Tensor], *, num_blocks: tf.Tensor | int, width: int, parallel: int
) -> tf.Tensor:
    """Partials of blocks, one compiled call each, several side by side.

    A call's shape does not depend on how many blocks a replica has, so neither do its bits.

    Args:
        block_sum: `block number (int32) -> partial [width]`; calls a compiled function.
        num_blocks: how many.
        width: length of a partial.
        parallel: calls under way at once.

    Returns:
        float64 `[num_blocks, width]`, in block order.
    """
    found = tf.TensorArray(tf.float64, num_blocks, element_shape=[width])
    _, found = tf.while_loop(
        lambda block, _: block < num_blocks,
        lambda block, found: (block + 1, found.write(block, block_sum(block))),
        (tf.constant(0), found),
        parallel_iterations=parallel,
    )
    return found.stack()


def running_sum(term: Callable[[tf.Tensor], tf.Tensor], *, count: tf.Tensor | int, width: int) -> tf.Tensor:
    """`term(0) + term(1) + ...`, added in order to zero; float64 `[width]`."""
    return tf.while_loop(
        lambda i, _: i < count,
        lambda i, total: (i + 1, total + term(i)),
        (tf.constant(0), tf.zeros([width], tf.float64)),
        parallel_iterations=1,
    )[1]


def fold_rounds(partials: tf.Tensor, *, shape: list[int]) -> tf.Tensor:
    """The sum over the first axis, of any length, added in order to zero.

    Args:
        partials: float64 `[rounds, *shape]`.
        shape: static shape of one round's partials.
    """
    partials = tf.ensure_shape(partials, [None, *shape])
    return tf.while_loop(
        lambda i, _: i < tf.shape(partials)[0],
        lambda i, total: (i + 1, total + partials[i]),
        (tf.constant(0), tf.zeros(shape, tf.float64)),
    )[1]


def gather(partials: tf.Tensor, *, num_shards: int) -> tf.Tensor:
    """All replicas' partials on every replica, in shard order.

    TensorFlow orders the members of its own gather by the names of their tasks, in which "task:10" comes before
    "task:2", and GPUs along their links. A sum has no order: each replica adds its partials to the zeros of the others,
    as integers, because floating-point sums lose the sign of zero and the smallest numbers.

    Args:
        partials: float64 `[ceil(V / R), width]`, this replica's; shards beyond `V` are padding.
        num_shards: `V`.

    Returns:
        float64 `[V, width]`.
    """
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync
    if replicas == 1:
        everyones = partials
    elif isinstance(context.strategy, tf.distribute.TPUStrategy):
        # Its gather is in the replicas' order, and its sums know no int64.
        everyones = context.all_gather(partials, axis=0)
    else:
        mine = tf.equal(tf.range(replicas), context.replica_id_in_sync_group)[:, tf.newaxis, tf.newaxis]
        slots = tf.where(mine, tf.bitcast(partials, tf.int64)[tf.newaxis], tf.zeros([], tf.int64))
        bits = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.reshape(slots, [-1, partials.shape[1]]))
        everyones = tf.bitcast(bits, tf.float64)
    return tf.ensure_shape(everyones[:num_shards], [num_shards, partials.shape[1]])


def fold(partials: tf.Tensor) -> tf.Tensor:
    """The sum over the first axis, added in order: `((p0 + p1) + p2) + ...`.

    Args:
        partials: float64 `[V, ...]`, `V` static.
    """
    num_shards = partials.shape[0]
    if num_shards <= _UNROLLED_SHARDS:
        total = partials[0]
        for shard in range(1, num_shards):
            total = total + partials[shard]
        return total
    return tf.while_loop(
        lambda shard, _: shard < num_shards,
        lambda shard, total: (shard + 1, total + partials[shard]),
        (tf.constant(1), partials[0]),
    )[1]
