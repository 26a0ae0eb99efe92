"""The TVM backend: kernels for CPUs (`kernels`) and GPUs (`cuda`), and the Relax functions that call them.

    emit.py     packed graph -> `lowered` plan (torch, no TVM)
    build.py    plan -> kernels.so, through worker processes and the kernel cache
    worker.py   one worker: compiles kernels, links (TVM, no torch)
    link.py     plan -> Relax module -> shared library

Nothing is imported here: workers import this package, and must not pay for torch.
"""
