"""NumPy arrays in, predictions out: `python examples/arrays.py`."""

from __future__ import annotations

import numpy as np

import tapedist

rng = np.random.default_rng(0)
x = rng.standard_normal((100_000, 3))
# Column by column, because a product of matrices may round otherwise on another processor, and the digest is that of
# these very rows.
y = 1.0 * x[:, 0] - 2.0 * x[:, 1] + 3.0 * x[:, 2] + 0.5 + rng.standard_normal(100_000)

# The last 20,000 rows are held out: they give the test loss and are never trained on.
rows = tapedist.ArraySource(x, y, feature_names=("a", "b", "c"), test_rows=20_000)

# No learning rate and no number of epochs: both are found from the rows, and training ends when every coefficient is
# within 0.01 standard errors of the least-squares optimum.
result = tapedist.train(tapedist.TrainConfig(), source=rows)

print("weights:", *(f"{weight:.4f}" for weight in result.weights))
print(f"bias: {result.bias:.4f}")
print(f"test loss: {result.test_loss:.4f}")
print("predictions:", *(f"{value:.4f}" for value in result.predict([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
print(f"digest: {result.digest}")
