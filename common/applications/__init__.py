"""What the finished generator is used for."""
