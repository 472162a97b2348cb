"""A development cluster without Docker: a real Kubernetes control plane and PostgreSQL, as plain processes.

For developers and tests only; nothing in `controller/` may import it. `python -m devcluster up` is the way in.
"""
