/* Runs compiled kernels on AArch64 without a TVM runtime: loads a kernel library, reads calls from a file,
 * makes each of them once and writes every argument back, so that any of them may be an output.
 *
 *   runner LIBRARY CALLS RESULTS
 *
 * CALLS: int32 number of calls; each: int32 length and bytes of the name, int32 number of arguments; each
 * argument: int32 type (0 tensor, 1 int64, 2 float64); a tensor: u8 type code, u8 bits, int32 rank, int64
 * shape[rank], data; a scalar: 8 bytes. RESULTS: the data of all tensors in order. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int32_t type_index; uint32_t zero; union { int64_t i; double f; void *p; }; } Any;
typedef struct { uint8_t code, bits; uint16_t lanes; } DataType;
typedef struct {
  void *data; struct { int32_t type, id; } device; int32_t ndim; DataType dtype;
  int64_t *shape, *strides; uint64_t byte_offset;
} Tensor;
typedef int (*Kernel)(void *, const Any *, int32_t, Any *);
enum { FFI_INT = 1, FFI_FLOAT = 3, FFI_TENSOR = 7, MAX_ARGS = 64 };

/* The three things a kernel library wants of a runtime. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t n) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < n; i++) if (parts[i]) fputs(parts[i], stderr);
  fputc('\n', stderr);
}
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}
static void *workspace_alloc(int type, int id, uint64_t bytes, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  void *p = NULL;
  return posix_memalign(&p, 64, bytes ? bytes : 1) ? NULL : p;
}
static int workspace_free(int type, int id, void *p) { (void)type, (void)id; free(p); return 0; }
typedef struct { void *sync; int32_t num_task; } ParallelEnv;
static int parallel_launch(int (*task)(int, ParallelEnv *, void *), void *closure, int n) {
  ParallelEnv env = {NULL, 1};
  (void)n;
  return task(0, &env, closure);
}

static void die(const char *what, const char *detail) {
  fprintf(stderr, "runner: %s %s\n", what, detail ? detail : "");
  exit(2);
}
static void read_bytes(FILE *f, void *to, size_t n) { if (n && fread(to, n, 1, f) != 1) die("short file", NULL); }
static void hook(void *library, const char *symbol, void *function) {
  void **slot = dlsym(library, symbol);
  if (slot) *slot = function;
}

int main(int argc, char **argv) {
  if (argc != 4) die("usage: runner LIBRARY CALLS RESULTS", NULL);
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL);
  if (!library) die("cannot load", dlerror());
  hook(library, "__TVMBackendAllocWorkspace", (void *)workspace_alloc);
  hook(library, "__TVMBackendFreeWorkspace", (void *)workspace_free);
  hook(library, "__TVMBackendParallelLaunch", (void *)parallel_launch);
  FILE *in = fopen(argv[2], "rb"), *out = fopen(argv[3], "wb");
  if (!in || !out) die("cannot open the files", NULL);
  int32_t calls;
  read_bytes(in, &calls, 4);
  for (int c = 0; c < calls; c++) {
    char symbol[512] = "__tvm_ffi_";
    int32_t length, nargs;
    read_bytes(in, &length, 4);
    if (length >= 400) die("name too long", NULL);
    read_bytes(in, symbol + 10, length);
    symbol[10 + length] = 0;
    Kernel kernel = (Kernel)dlsym(library, symbol);
    if (!kernel) die("no such kernel:", symbol);
    read_bytes(in, &nargs, 4);
    if (nargs > MAX_ARGS) die("too many arguments:", symbol);
    Any args[MAX_ARGS], result;
    Tensor tensors[MAX_ARGS];
    size_t bytes[MAX_ARGS];
    memset(args, 0, sizeof args);
    memset(&result, 0, sizeof result);
    for (int a = 0; a < nargs; a++) {
      int32_t type, rank;
      uint8_t code_bits[2];
      read_bytes(in, &type, 4);
      bytes[a] = 0;
      if (type) {
        args[a].type_index = type == 1 ? FFI_INT : FFI_FLOAT;
        read_bytes(in, &args[a].i, 8);
        continue;
      }
      read_bytes(in, code_bits, 2);
      read_bytes(in, &rank, 4);
      int64_t *shape = malloc(8 * (size_t)(2 * rank + 1)), *strides = shape + rank, elements = 1;
      read_bytes(in, shape, 8 * (size_t)rank);
      for (int d = rank - 1; d >= 0; d--) strides[d] = elements, elements *= shape[d];
      bytes[a] = (size_t)elements * (code_bits[1] / 8);
      void *data = NULL;
      if (posix_memalign(&data, 64, bytes[a] + 64)) die("out of memory", NULL);
      read_bytes(in, data, bytes[a]);
      tensors[a] = (Tensor){data, {1, 0}, rank, {code_bits[0], code_bits[1], 1}, shape, strides, 0};
      args[a].type_index = FFI_TENSOR;
      args[a].p = &tensors[a];
    }
    if (kernel(NULL, args, nargs, &result)) die("kernel failed:", symbol);
    for (int a = 0; a < nargs; a++) {
      if (args[a].type_index != FFI_TENSOR) continue;
      if (bytes[a] && fwrite(tensors[a].data, bytes[a], 1, out) != 1) die("cannot write", NULL);
      free(tensors[a].data);
      free(tensors[a].shape);
    }
  }
  return fclose(out) ? 2 : 0;
}
