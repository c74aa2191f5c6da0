"""The folder `configs` of a clone becomes `interp_models/configs` of the wheel; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

folders = sorted(path.name for path in (Path(__file__).parent / "configs").iterdir() if path.is_dir())
configs = ["interp_models.configs", *(f"interp_models.configs.{name}" for name in folders)]

setup(
    packages=[*find_packages(include=["interp_models*"]), *configs],
    package_dir={"interp_models.configs": "configs"},
)
