"""What a machine can do, whether it does it, and what to change."""
