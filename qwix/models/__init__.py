"""Small NNX reference models, for the command line, tests and benchmarks."""
