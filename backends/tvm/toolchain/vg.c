/* What LLVM calls before a function enters streaming mode: the length of vectors outside it, for what unwinds the stack.
 * Nothing here does, and compilers before GCC 14 have no such function. It may change no register but x0. */
__attribute__((weak, visibility("hidden"))) long __arm_get_current_vg(void) { return 0; }
