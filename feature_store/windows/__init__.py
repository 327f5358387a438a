"""Windowed features: one SQL text, read three ways (stream, history, serving) to the same value."""
