"""`make fanout-soak` and `make sandbox-soak`: work for the product while its workers are killed, and a verdict on what counted.

plan: what the Intents are to do · crew, places: workers, sandbox providers and what is done to them · drive: one run ·
rows, evidence: what SQL, the sandboxes' start log and the API server say · judge: pure, rows in, violations out · report.
"""
