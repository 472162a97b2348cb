"""PostgreSQL: the only place with SQL. Implements the store ports; imports nothing of the other adapters."""
