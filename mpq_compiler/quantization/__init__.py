"""How one tensor is quantized: statistics, fitting, rounding, scaling."""
