"""Sandbox providers: the only package that starts, feeds and kills sandboxes. Implements `ports.SandboxProvider`.

`mock` (memory only), `local` (bubblewrap on this host), `e2b` (its SDK) and what they share. Imports core and ports, nothing beside it.
"""
