"""What the package costs, as ratios to the passes of the model itself.

Each file measures one thing, `python -m benchmarks.<name> --help`, and writes `benchmarks/results/<name>.json`;
`python -m benchmarks.tables` writes the results into the pages of docs/results. How it is measured: see
`benchmarks.harness`.
"""
