"""Lists the packages: molora and its parts, plus recipes/ which is installed as molora/recipes."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["molora", "molora.*"]), "molora.recipes"],
    package_dir={"molora": "molora", "molora.recipes": "recipes"},
)
