"""The demo: the main job end to end on real servers, its proof, and the report a person can look at."""
