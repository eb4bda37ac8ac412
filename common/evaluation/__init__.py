"""How good the generated faces are."""
