"""Units, randomness, clipping, accounting and the ledger."""
