"""Models: loaded or built without weights, their heads, their losses, and what they write."""
