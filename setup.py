"""What pyproject.toml cannot say: in a wheel configs/ lies within the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["alignvlm_jax*"]), "alignvlm_jax.configs"],
    package_dir={"alignvlm_jax.configs": "configs"},
)
