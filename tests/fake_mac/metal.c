/* Metal as a command-line tool sees it: no default device before CoreGraphics is loaded. */
#include <stdlib.h>

long device = 1, devices = 2;

void *MTLCreateSystemDefaultDevice(void) {
    return getenv("FAKE_WINDOW_SERVER") ? &device : 0;
}

void *MTLCopyAllDevices(void) { return getenv("FAKE_NO_DEVICES") ? 0 : &devices; }
