"""`pgolf doctor`: what a run would find wrong with this machine, how fast it is, what differs from another."""

from pgolf.doctor.compare import compare
from pgolf.node import digest, fingerprint

__all__ = ["compare", "digest", "fingerprint"]
