"""Routing replay: what a caller passes as `replay=` and what the router honours."""
