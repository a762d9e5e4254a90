/* Loading CoreGraphics connects a process to the window server. */
#include <stdlib.h>

__attribute__((constructor)) static void connect(void) { setenv("FAKE_WINDOW_SERVER", "1", 1); }
