"""What a process can be: the worker (plans and executes) and the controller (watches and decides). Composed by main."""
