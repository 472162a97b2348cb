"""Pure and synchronous: no I/O, no clock, no randomness, no environment. Importable by everything, imports nothing above."""
