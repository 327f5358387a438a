"""REST serving of features and predictions, and its Python client."""
