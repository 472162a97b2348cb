"""Sisu-Kodo: a goal becomes a plan, people approve it, sandboxes execute exactly that."""
