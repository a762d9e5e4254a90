/* The Objective-C runtime, for the two messages that are sent; any other ends the process. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static long device = 1;

void *sel_registerName(const char *name) { return strdup(name); }

uintptr_t objc_msgSend(long *receiver, const char *selector) {
    if (*receiver == 2 && !strcmp(selector, "firstObject")) return (uintptr_t)&device;
    if (*receiver == 1 && !strcmp(selector, "recommendedMaxWorkingSetSize"))
        return strtoull(getenv("FAKE_WORKING_SET"), 0, 10);
    abort();
}
