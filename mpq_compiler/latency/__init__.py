"""What kernels take: tables of times, and how they are measured."""
