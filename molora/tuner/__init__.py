"""The PEFT method: config, layers, model, and the verbs that change experts."""

# First of all: importing peft registers the method, which imports the modules of this package whole. Were
# one of them to import peft itself first, registration would meet that module half initialised.
import peft  # noqa: F401
