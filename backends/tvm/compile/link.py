"""Links a plan to a shared library: Relax functions that call the kernels, and the kernels' objects.

The pipeline of Relax passes is short: every call is a kernel already, so nothing is legalized or fused. The Relax
module holds no code of kernels, only their signatures. The virtual machine finds them in its library by name.
"""

from __future__ import annotations

import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform
from tvm.relax.vm_build import _vmcodegen, _vmlink
from tvm.script.ir_builder import tirx as T
from tvm.support import cc

from mpq_compiler.backends.tvm import templates
from mpq_compiler.backends.tvm.kernels.common.template import primfunc
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument, sized
from mpq_compiler.backends.tvm.plan.calls import Call, Kernel, Lowered, Value
from mpq_compiler.backends.tvm.toolchain.linker import linker
from mpq_compiler.backends.tvm.toolchain.machine_code import DEVICE, Imports
from mpq_compiler.targets.table import Target

PREPARE = "prepare"
PAGE = 4096
"""Bytes of a page in the virtual machine's memory pool."""
_LINK = ("-Wl,--strip-all", "-Wl,--build-id=none", "-Wl,-z,noexecstack")


def link(
    lowered: Lowered, target: Target, objects: Sequence[Path], output: Path, interface: str
) -> dict[str, int]:
    """Writes the library of a plan.

    Its bytes depend on the plan, the objects and the versions of TVM and the linker, not on any path.

    Args:
        lowered: the plan.
        target: decides the linker.
        objects: the object file of each kernel.
        output: the library to write.
        interface: the hash that it states (`artifact.interface`).

    Returns:
        The memory that each function holds, in bytes (`held_bytes`).

    Raises:
        UserError: there is no linker for the target.
    """
    planned = planning()(_Builder(lowered, target).module())
    plain = lowering()(planned)  # says what functions hold, which graphs share
    module = lowering()(_graphs(planned)) if target.is_cuda else plain
    builder = relax.ExecBuilder()
    _vmcodegen(builder, module, "bytecode")
    # A library that holds code of its own is what makes the machine look up kernels in the shared object.
    anchor = primfunc("mpq_library", [Argument("x", (1,))], lambda batch, buffers: T.evaluate(0))
    executable = _vmlink(builder, tvm.target.Target(dict(target.host)), tir_mod=tvm.IRModule({"mpq_library": anchor}))
    if target.is_cuda:
        modules = [path.with_suffix(DEVICE).read_bytes() for path in objects]
        export_cuda(executable.mod, target, output, objects, modules, interface)
    else:
        export(executable.mod, target, output, objects, interface)
    functions = {name.name_hint: f for name, f in plain.functions.items() if isinstance(f, relax.Function)}
    return {name: held_bytes(function) for name, function in functions.items()}


def held_bytes(function: relax.Function) -> int:
    """The memory in bytes that a function allocates for its results, the output included, in whole pages."""
    values = (binding.value for block in function.body.blocks for binding in block.bindings)
    blocks = (value for value in values if getattr(getattr(value, "op", None), "name", "") == "relax.vm.alloc_storage")
    return sum(-(-int(block.args[0].values[0]) // PAGE) * PAGE for block in blocks)


def export(compiled: Any, target: Target, output: Path, objects: Sequence[Path], interface: str) -> None:
    """Writes the library of a compiled module and further objects, with a thread pool of its own (mpq_pool.c)."""
    compiler, options = linker(target), list(_LINK)
    with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
        pool = compile_pool(target, Path(folder, "pool.o"), "-c")
        addons = [str(path) for path in (*objects, pool, _compile_interface(target, Path(folder), interface))]
        compiled.export_library(str(output), fcompile=cc.cross_compiler(compiler, options=options), addons=addons)


def export_cuda(
    compiled: Any,
    target: Target,
    output: Path,
    objects: Sequence[Path],
    modules: Sequence[bytes],
    interface: str,
) -> None:
    """Writes the library of a compiled module for a GPU.

    Args:
        compiled: the module.
        target: decides the linker.
        output: the library to write.
        objects: the objects that launch kernels.
        modules: the kernels' modules, as the runtime reads them.
        interface: the hash that the library states.
    """
    imports = Imports.of(compiled)
    for module in modules:
        imports.add(b"cuda", module)
    (library,) = compiled.imports
    with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
        own, packed = Path(folder, "library.o"), Path(folder, "imports.o")
        library.write_to_file(str(own))
        imports.write_object(packed, linker(target))
        files = [str(path) for path in (own, packed, *objects, _compile_interface(target, Path(folder), interface))]
        command = [linker(target), "-shared", "-fPIC", *_LINK, *files, "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True)


def compile_pool(target: Target, output: Path, kind: str) -> Path:
    """Writes mpq_pool.c as an object (``-c``) or as a library (``-shared``)."""
    source = Path(__file__).parents[1] / "standalone" / "mpq_pool.c"
    command = [linker(target), "-std=gnu11", "-O2", "-fPIC", kind, str(source), "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    return output


def _compile_interface(target: Target, folder: Path, interface: str) -> Path:
    """The object by which a library states its interface (mpq_interface.c)."""
    source, output = Path(__file__).parents[1] / "standalone" / "mpq_interface.c", folder / "interface.o"
    command = [linker(target), "-std=gnu11", "-O2", "-fPIC", f'-DINTERFACE="{interface}"', "-c", str(source)]
    subprocess.run([*command, "-o", str(output)], check=True, capture_output=True)
    return output


def compile_cudart(target: Target, output: Path) -> None:
    """Compiles cudart.c, the shim that TVM's runtime takes for CUDA 13's runtime. UserError: there is no linker."""
    source = Path(__file__).parents[1] / "toolchain" / "cudart.c"
    with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
        stub, symbols = Path(folder, "stub.so"), Path(folder, "symbols")
        for name, written, more in (
            ("libcudart.so.12", stub, ["-DSTUB"]),
            ("libcudart.so.13", output, [*_LINK, str(stub), "-Wl,-z,now", "-Wl,-z,norelro"]),
        ):
            symbols.write_text(f"{name} {{ global: cuda*; local: *; }};")  # their version is the library's name
            command = [linker(target), "-std=gnu11", "-O2", "-fPIC", "-shared", str(source), *more, "-o", str(written)]
            command += [f"-Wl,-soname,{name}", f"-Wl,--version-script,{symbols}"]
            subprocess.run(command, check=True, capture_output=True)


def planning() -> tvm.transform.Pass:
    """The passes that turn kernel calls into calls on buffers, and plan the memory of each function."""
    return tvm.transform.Sequential(
        [
            transform.RewriteDataflowReshape(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
        ]
    )


def lowering() -> tvm.transform.Pass:
    """The passes that lower planned functions to instructions of the virtual machine.

    All shapes are static, so VMShapeLower is left out. It would also check each of hundreds of prepared tensors in
    every call, though the runtime stages inputs in their exact shapes.
    """
    return tvm.transform.Sequential(
        [
            transform.LowerAllocTensor(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.AttachGlobalSymbol(),
        ]
    )


def _graphs(module: tvm.IRModule) -> tvm.IRModule:
    """Rewrites a module for a GPU so that all functions but `prepare` capture their launches in a CUDA graph."""
    again = tvm.IRModule({name: f for name, f in module.functions.items() if name.name_hint != PREPARE})
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        rewritten = transform.RewriteCUDAGraph()(again)
    rewritten.update_func(module.get_global_var(PREPARE), module[PREPARE])
    return rewritten


class _Builder:
    """Builds the Relax module of a plan."""

    def __init__(self, lowered: Lowered, target: Target) -> None:
        self.lowered, self.target = lowered, target
        self.builder = relax.BlockBuilder()
        self.signatures: dict[Kernel, tuple[Any, list[Argument], list[Argument]]] = {}

    def module(self) -> tvm.IRModule:
        """The module with signatures of the kernels, `prepare`, the parts and the functions."""
        for kernel in self.lowered.kernels():
            inputs, outputs = templates.arguments(kernel, self.target)
            signature = primfunc(kernel.name, [*inputs, *outputs], lambda batch, buffers: T.evaluate(0))
            self.signatures[kernel] = (self.builder.add_func(signature, kernel.name), inputs, outputs)
        types = self._prepare()
        for part in self.lowered.parts().values():
            self._function(part.name, part.inputs, part.calls, part.outputs, 1, types)
        for function in self.lowered.functions:
            for batch in function.batches:
                self._function(function.name(batch), function.arguments, function.own, function.output, batch, types)
        return self.builder.get()

    def _prepare(self) -> list[relax.Type]:
        """Builds ``prepare(stored...)``; returns the types of the prepared tensors."""
        parameters = [_variable(f"s{i}", value, 0) for i, value in enumerate(self.lowered.stored)]
        env = {value.name: p for value, p in zip(self.lowered.stored, parameters, strict=True)}
        with self.builder.function(PREPARE, parameters):
            with self.builder.dataflow():
                for call in self.lowered.preparation:
                    self._call(call, env, 0)
                prepared = [env[name] for name in self.lowered.prepared]
                result = self.builder.emit_output(relax.Tuple(prepared))
            self.builder.emit_func_output(result)
        return [value.ty for value in prepared]

    def _function(
        self,
        name: str,
        arguments: Sequence[Value],
        calls: Sequence[Call],
        result: Value | Sequence[Value],
        batch: int,
        types: Sequence[Any],
    ) -> None:
        """Builds ``name(arguments..., prepared)``, which returns one result or a tuple.

        The prepared tensors are one argument, a tuple, because the virtual machine allocates room for all arguments in
        every call.
        """
        inputs = [_variable(f"x{i}", value, batch) for i, value in enumerate(arguments)]
        weights = relax.Var("prepared", relax.TupleType(types))
        env = {value.name: p for value, p in zip(arguments, inputs, strict=True)}
        places = {name: i for i, name in enumerate(self.lowered.prepared)}
        # A graph keeps the addresses of all arguments: the runtime stages inputs in the same memory in every call.
        attributes = {"num_input": 0} if self.target.is_cuda else None
        with self.builder.function(name, [*inputs, weights], attrs=attributes):
            with self.builder.dataflow():
                for call in calls:
                    for _, read in call.operands:
                        if read in places and read not in env:
                            env[read] = self.builder.emit(relax.TupleGetItem(weights, places[read]))
                    self._call(call, env, batch)
                results = [result] if isinstance(result, Value) else result
                shaped = [self._shaped(env[value.name], sized(value.shape, batch)) for value in results]
                made = shaped[0] if isinstance(result, Value) else relax.Tuple(shaped)
                output = self.builder.emit_output(made)
            self.builder.emit_func_output(output)

    def _call(self, call: Call, env: dict[str, Any], batch: int) -> None:
        function, inputs, outputs = self.signatures[call.kernel]
        operands = dict(call.operands)
        arguments = [self._shaped(env[operands[a.name]], sized(a.shape, batch)) for a in inputs]
        if call.into:
            output, *workspaces = outputs
            if call.into not in env:
                env[call.into] = self._allocated(output, batch)
            target = self._shaped(env[call.into], sized(output.shape, batch))
            made = [target, *(self._allocated(argument, batch) for argument in workspaces)]
            self.builder.emit(relax.Call(function, [*arguments, *made]))
            return
        types = [relax.TensorType(sized(a.shape, batch), a.dtype) for a in outputs]
        made = self.builder.emit(relax.call_tir(function, arguments, types if len(types) > 1 else types[0]))
        names = dict(call.results)
        if len(types) == 1:
            env[names[outputs[0].name]] = made
            return
        for i, argument in enumerate(outputs):
            if argument.name in names:  # no one reads workspaces
                env[names[argument.name]] = self.builder.emit(relax.TupleGetItem(made, i))

    def _allocated(self, argument: Argument, batch: int) -> Any:
        shape = relax.ShapeExpr(sized(argument.shape, batch))
        return self.builder.emit(relax.op.builtin.alloc_tensor(shape, argument.dtype, 0))

    def _shaped(self, value: Any, shape: tuple[int, ...]) -> Any:
        """Reshapes a value to the shape in which a kernel reads it."""
        own = tuple(int(extent) for extent in value.ty.shape)
        if own == shape:
            return value
        if math.prod(own) != math.prod(shape):
            raise AssertionError(f"{value} of shape {own} is read as {shape}")
        return self.builder.emit(relax.op.reshape(value, shape))


def _variable(name: str, value: Value, batch: int) -> relax.Var:
    return relax.Var(name, relax.TensorType(sized(value.shape, batch), value.dtype))
