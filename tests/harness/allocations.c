/* Counts allocations above a size, preloaded: `allocations_watch(1)` begins, `allocations_seen()` says how many. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>

enum { LARGE = 4096 };
static atomic_int watching;
static atomic_long seen, largest;

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static void count(size_t size) {
  if (!watching || size <= LARGE) return;
  seen++;
  if ((long)size > largest) largest = (long)size;
}
void allocations_watch(int on) { seen = largest = 0; watching = on; }
long allocations_seen(void) { return seen; }
long allocations_largest(void) { return largest; }

void *malloc(size_t size) { count(size); return __libc_malloc(size); }
void *calloc(size_t n, size_t size) { count(n * size); return __libc_calloc(n, size); }
void *realloc(void *old, size_t size) { count(size); return __libc_realloc(old, size); }
void *memalign(size_t align, size_t size) { count(size); return __libc_memalign(align, size); }
void *aligned_alloc(size_t align, size_t size) { count(size); return __libc_memalign(align, size); }
int posix_memalign(void **to, size_t align, size_t size) {
  count(size);
  *to = __libc_memalign(align, size);
  return *to ? 0 : ENOMEM;
}
void *mmap(void *at, size_t size, int protection, int flags, int file, off_t offset) {
  static void *(*real)(void *, size_t, int, int, int, off_t);
  if (!real) real = dlsym(RTLD_NEXT, "mmap");
  count(size);
  return real(at, size, protection, flags, file, offset);
}
