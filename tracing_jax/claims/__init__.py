"""Claims on a pair of models: what is stated of it is tested, and holds, is contradicted, or cannot be tested."""

from tracing_jax.claims.checking import check_claim
from tracing_jax.claims.claim import ASSERTS, UNTESTED, ClaimInputs, ClaimResult

__all__ = ["ASSERTS", "UNTESTED", "ClaimInputs", "ClaimResult", "check_claim"]
