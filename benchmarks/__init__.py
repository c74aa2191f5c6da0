"""What the package costs in time and memory, divided by the passes of the model itself.

Each file measures one thing (`python -m benchmarks.<name> --help`) and writes `benchmarks/results/<name>.json`.
`python -m benchmarks.tables` writes the results into the pages of docs/results. `benchmarks.harness` describes how
time, FLOPs and memory are measured.
"""
