"""Point-in-time-correct training sets, tracked training and promotion."""
