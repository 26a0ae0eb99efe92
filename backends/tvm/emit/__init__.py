"""From the packed graph to a plan of kernel calls, one function an operator."""
