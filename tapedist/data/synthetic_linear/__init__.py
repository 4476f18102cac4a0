"""The synthetic dataset as a TensorFlow Datasets builder. Importing this package imports nothing."""
