"""PredictFlow's command line, settings, wiring, local services, data sources and demo."""
