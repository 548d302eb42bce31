"""How one weight is stored, and the few numeric families that all formats lower to."""
