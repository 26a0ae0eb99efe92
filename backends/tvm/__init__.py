"""The TVM backend: kernels for CPUs (`kernels`) and GPUs (`cuda`), and the Relax functions that call them.

    emit/        the packed graph to kernel calls, the first stage of the lowering (torch, no TVM)
    plan/        the plan of kernel calls: its stages, rules and text
    lowering.py  which stages there are for a target, and in which order
    build.py     plan -> kernels.so, through worker processes and the kernel cache
    inspect.py   plans between the stages, as dumps look at them
    compile/     in a worker: compiles kernels, links the library, runs plans call by call (TVM, no torch)

Nothing is imported here: workers import this package, and must not pay for torch.
"""
