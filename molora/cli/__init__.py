"""The command line: main.py and one file per verb, each of which calls one function of the package."""
