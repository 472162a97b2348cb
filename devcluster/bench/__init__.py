"""`make bench`: latency, throughput and fan-out of the product, beside the machine's own limits of the same run.

Nothing here is part of the product, and no test has a time limit from here: a machine may be slow, a number may not be made up.
"""
