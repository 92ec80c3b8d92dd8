"""Federated rounds: clients train copies of one adapter on records of their own, a server makes one of them."""

from molora.federated.record import send
from molora.federated.round import Decision, Outcome, Round

__all__ = ["Decision", "Outcome", "Round", "send"]
