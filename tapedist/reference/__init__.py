"""The specification of the arithmetic in plain NumPy: what every machine must reproduce bit for bit.

The twin of `docs/arithmetic.md`, written to be read; it imports nothing else of the package, so that tests can hold the
package against it. All arithmetic is IEEE binary64, round to nearest even, in the order written, and no product is
contracted into an addition. Sums over rows have no order (`exact.integers`), other sums are `exact.folded`.
"""

# ruff: noqa: F401  (one face for callers)

from tapedist.reference.exact import KINDS, Kind, exact_sum, flush, folded, integers, pow2, trim, value
from tapedist.reference.loops import Step, digest, full_batch, initial_parameters, loss_limit, mini_batch, split_sizes
from tapedist.reference.moments import (
    Columns,
    Form,
    Moments,
    columns_of,
    form_gradient,
    moment_epochs,
    moment_integers,
    moments,
    quadratic_form,
)
from tapedist.reference.order import batch_rows, permuted
from tapedist.reference.rates import auto_rate, singular_values
from tapedist.reference.rows import Bounds, Chunk, Ranges, as_dtype, as_trained, bounds, ranges, standardized
from tapedist.reference.steps import (
    Diverged,
    Problem,
    Totals,
    first_slots,
    loss_and_gradient_sums,
    penalty,
    term_bounds,
    totals,
    update,
)
from tapedist.reference.synthetic import LARGEST_NORMAL, normals, synthetic_ranges, synthetic_rows
