-- Run by the Postgres image on its first start: MLflow keeps its tables apart from the feature registry.
CREATE DATABASE mlflow;
