/* The functions of libSystem that the server calls, on a Mac whose state is in FAKE_ variables.
 *
 * Prototypes, sizes and error codes are those of the manual pages and headers of macOS 15.4:
 * sysctlbyname(3), host_statistics64 in mach/mach_host.h, notify(3), proc_pid_rusage in libproc.h, gethostuuid(2), setxattr(2),
 * pthread_setname_np(3), pthread_set_qos_class_self_np(3), malloc_zone_pressure_relief(3).
 */
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int64_t told(const char *name, int64_t usual) {
    const char *text = getenv(name);
    return text ? strtoll(text, 0, 10) : usual;
}

static int fail(int code) {
    errno = code;
    return -1;
}

int sysctlbyname(const char *name, void *old, size_t *size, void *fresh, size_t fresh_size) {
    struct { const char *name; size_t size; int64_t value; } known[] = {
        {"hw.memsize", 8, told("FAKE_MEMORY", 17179869184)},
        {"iogpu.wired_limit_mb", 4, told("FAKE_WIRED_MIB", 0)},
        {"kern.memorystatus_vm_pressure_level", 4, told("FAKE_PRESSURE", 1)},
    };
    if (fresh || fresh_size) return fail(EPERM);
    if (!strcmp(name, "kern.osversion")) {
        if (*size < sizeof "24G84") return fail(ENOMEM);
        *size = sizeof "24G84";
        memcpy(old, "24G84", *size);
        return 0;
    }
    for (int i = 0; i < 3; i++) {
        if (strcmp(name, known[i].name)) continue;
        if (*size < known[i].size) return fail(ENOMEM);
        *size = known[i].size;
        memcpy(old, &known[i].value, known[i].size);
        return 0;
    }
    return fail(ENOENT);
}

static unsigned int host_references;

unsigned int mach_host_self(void) {
    host_references++;
    return 0x80000103;
}

int host_page_size(unsigned int host, size_t *size) {
    *size = 16384;
    return host == 0x80000103 ? 0 : 4;
}

/* Flavor 4: pages that are free, active, inactive and wired come first of 38 numbers. */
int host_statistics64(unsigned int host, int flavor, uint32_t *info, uint32_t *count) {
    if (host != 0x80000103 || flavor != 4) return 4;
    if (*count < 38 || *count > 256) return 5;
    memset(info, 0xEE, 38 * 4);
    info[0] = told("FAKE_FREE_PAGES", 1000);
    info[1] = told("FAKE_ACTIVE_PAGES", 2000);
    info[2] = told("FAKE_INACTIVE_PAGES", 3000);
    *count = 38;
    return 0;
}

unsigned int fake_host_references(void) { return host_references; }

/* Statuses: 0 right, 1 a name that is not valid, 2 a token that is not valid. */
static int registered;

unsigned int notify_register_check(const char *name, int *token) {
    if (strcmp(name, "com.apple.system.thermalpressurelevel")) return 1;
    *token = 40 + ++registered;
    return 0;
}

unsigned int notify_get_state(int token, uint64_t *state) {
    if (token <= 40 || token > 40 + registered) return 2;
    *state = told("FAKE_THERMAL", 0);
    return 0;
}

int fake_registrations(void) { return registered; }

/* Flavor 2 fills 160 bytes: an id of 16 and 18 numbers, the footprint at byte 72. */
int proc_pid_rusage(int pid, int flavor, void *buffer) {
    uint64_t *numbers = (uint64_t *)((char *)buffer + 16);
    if (flavor != 2) return fail(EINVAL);
    if (kill(pid, 0)) return fail(ESRCH);
    memset(buffer, 0xEE, 160);
    numbers[7] = pid == getpid() ? told("FAKE_FOOTPRINT", 1000) : told("FAKE_OTHERS", 2000);
    return 0;
}

struct mac_time { int64_t seconds; int64_t nanoseconds; };

int gethostuuid(unsigned char *id, const struct mac_time *wait) {
    if (wait->seconds < 0 || wait->nanoseconds < 0) return fail(EINVAL);
    memset(id, 0xA5, 16);
    return 0;
}

int setxattr(const char *path, const char *name, const void *value, size_t size,
             uint32_t position, int options) {
    char target[2048];
    if (position || options) return fail(EINVAL);
    snprintf(target, sizeof target, "%s/%s", path, name);
    FILE *file = fopen(target, "w");
    if (!file) return fail(ENOENT);
    fwrite(value, 1, size, file);
    return fclose(file);
}

static char thread_name[64];
static int quality, reliefs;

/* Unlike Linux' function it has no thread as an argument. */
int pthread_setname_np(const char *name) {
    strncpy(thread_name, name, sizeof thread_name - 1);
    return 0;
}

int pthread_set_qos_class_self_np(unsigned int class, int priority) {
    if (priority > 0 || priority < -15) return EINVAL;
    quality = class;
    return 0;
}

size_t malloc_zone_pressure_relief(void *zone, size_t goal) {
    reliefs += zone == 0 && goal == 0;
    return 0;
}

const char *fake_thread_name(void) { return thread_name; }
int fake_quality(void) { return quality; }
int fake_reliefs(void) { return reliefs; }
