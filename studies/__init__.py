"""Studies of trained models: accuracy, maps and prototypes, but no speed.

Each file answers one question (`python -m studies.<name> --help`). Results are in `studies/results/<name>.json`;
`python -m benchmarks.tables` writes them into the pages of docs/results. Speed and memory are measured in `benchmarks`.
"""
