"""Benchmarks: PredictFlow beside stock Feast and hand-written queries, in one run on the same data."""
