"""Parts of benchmarks/soak.py, and of the tests that end trainings with signals."""
