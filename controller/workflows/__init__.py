"""DBOS: the product's story as durable workflows. Ports only; the only importer of dbos beside main and db/migrate."""
