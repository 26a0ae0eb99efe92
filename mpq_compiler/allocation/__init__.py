"""Which layer gets which bits: tables of losses, budgets, the integer program."""
