"""What bench and soaks share: a stack of their own, the people's side of the API, costs, progress and the end of a command.

Not part of the product; nothing here decides whether a run was good.
"""
