"""From the plan to machine code: worker processes, linking, tuning, memory."""
