"""Kubernetes: the watch, the queue, reconcile and the writers. The only place that talks to the API server about our kinds."""
