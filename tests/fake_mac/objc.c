/* The Objective-C runtime: two messages, any other of which ends the process, and pools. */
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

/* A pool's address has 64 bits. */
static void *pool = (void *)0x7fff12345678;
static int pools;

void *objc_autoreleasePoolPush(void) {
    pools++;
    return pool;
}

void objc_autoreleasePoolPop(void *popped) {
    if (popped != pool) abort();
    pools--;
}

int fake_pools(void) { return pools; }
