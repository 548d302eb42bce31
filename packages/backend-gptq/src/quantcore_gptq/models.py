"""What the methods of this package need to know of a model."""

from __future__ import annotations

ROUTERS = ("gate", "router", "shared_expert_gate")  # last parts of names of layers that choose experts; they stay float
