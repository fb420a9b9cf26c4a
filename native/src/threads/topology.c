/* topology.c: what the kernel says about cores, NUMA nodes and CPU quotas. Linux only; elsewhere every processor
 * is a core of one node. Files that are missing or unreadable mean "no limit" and "one node", never an error. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "topology.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PATH = 4096 };

/* Add the CPUs of a list such as "0-3,8" to `cpus`; returns where the list ends, NULL if it is none. */
static const char *parse_list(const char *text, struct kt_cpus *cpus) {
    for (;;) {
        char *end;
        if (*text < '0' || *text > '9') return NULL;
        long first = strtol(text, &end, 10), last = first;
        if (*end == '-') {
            text = end + 1;
            if (*text < '0' || *text > '9') return NULL;
            last = strtol(text, &end, 10);
        }
        if (first > last || last >= KT_MAX_CPUS) return NULL;
        for (long cpu = first; cpu <= last; cpu++) kt_cpus_add(cpus, (int)cpu);
        if (*end != ',') return end;
        text = end + 1;
    }
}

#if defined(__linux__)
#include <dirent.h>
#include <sched.h>

/* The start of a file as text; 0 if there is none. */
static int read_text(const char *path, char *text, size_t size) {
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    size_t n = fread(text, 1, size - 1, f);
    text[n] = 0;
    fclose(f);
    return n > 0;
}

int kt_bind_thread(const struct kt_cpus *cpus) {
    return sched_setaffinity(0, sizeof *cpus, (const cpu_set_t *)cpus) == 0;
}
int kt_thread_cpus(struct kt_cpus *cpus) {
    memset(cpus, 0, sizeof *cpus);
    return sched_getaffinity(0, sizeof *cpus, (cpu_set_t *)cpus) == 0;
}
int kt_current_cpu(void) { return sched_getcpu(); }

/* The lowest-numbered hardware thread of the core that `cpu` belongs to, or `cpu` itself if unknown. */
static int first_sibling(const char *root, int cpu) {
    char path[PATH], text[64];
    snprintf(path, sizeof path, "%s/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", root, cpu);
    if (!read_text(path, text, sizeof text) || *text < '0' || *text > '9') return cpu;
    long first = strtol(text, NULL, 10);
    return first < KT_MAX_CPUS ? (int)first : cpu;
}

static int by_number(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

/* cpus[n] = the CPUs of the n-th node that has any; returns how many nodes. Node numbers may have gaps. */
static int read_nodes(const char *root, struct kt_cpus *cpus) {
    char path[PATH], text[PATH];
    int number[KT_MAX_NODES], found = 0, nodes = 0;
    snprintf(path, sizeof path, "%s/sys/devices/system/node", root);
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d)) && found < KT_MAX_NODES;)
        if (!strncmp(e->d_name, "node", 4) && e->d_name[4] >= '0' && e->d_name[4] <= '9')
            number[found++] = atoi(e->d_name + 4);
    if (d) closedir(d);
    qsort(number, (size_t)found, sizeof *number, by_number);
    for (int i = 0; i < found; i++) {
        snprintf(path, sizeof path, "%s/sys/devices/system/node/node%d/cpulist", root, number[i]);
        memset(&cpus[nodes], 0, sizeof *cpus);
        if (read_text(path, text, sizeof text) && parse_list(text, &cpus[nodes])) nodes++; /* else memory only */
    }
    return nodes;
}

/* ---- the cgroup ------------------------------------------------------------------------------------- */

static int grant(double quota, double period) {
    if (quota <= 0 || period <= 0 || quota / period >= INT_MAX) return INT_MAX;
    double cpus = quota / period;
    int n = (int)cpus;
    return n + (cpus > n) ? n + (cpus > n) : 1;
}

/* Version 2: "max 100000" or "200000 100000". */
static int read_v2(const char *group) {
    char path[PATH + 16], text[64];
    double quota, period;
    snprintf(path, sizeof path, "%s/cpu.max", group);
    if (!read_text(path, text, sizeof text) || sscanf(text, "%lf %lf", &quota, &period) != 2) return INT_MAX;
    return grant(quota, period);
}

/* Version 1: two files; quota -1 without a limit. */
static int read_v1(const char *group) {
    char path[PATH + 32], quota[64], period[64];
    snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", group);
    if (!read_text(path, quota, sizeof quota)) return INT_MAX;
    snprintf(path, sizeof path, "%s/cpu.cfs_period_us", group);
    if (!read_text(path, period, sizeof period)) return INT_MAX;
    return grant(atof(quota), atof(period));
}

/* The least grant of mount/path and of every group above it. In a container the path may not be visible under the
 * mount: missing groups grant everything, and the walk still meets the container's own at the mount. */
static int walk(const char *root, const char *mount, const char *path, int (*read)(const char *)) {
    char group[PATH];
    int n = snprintf(group, sizeof group, "%s/sys/fs/cgroup%s%s", root, mount, strstr(path, "..") ? "" : path);
    if (n < 0 || n >= PATH) return INT_MAX;
    const size_t top = strlen(root) + strlen("/sys/fs/cgroup") + strlen(mount);
    int least = read(group);
    for (char *slash; (slash = strrchr(group, '/')) && (size_t)(slash - group) >= top;) {
        *slash = 0;
        int here = read(group);
        if (here < least) least = here;
    }
    return least;
}

/* Whether "cpu" is one of the comma-separated controllers. */
static int has_cpu(const char *controllers) {
    for (const char *at = controllers; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (!strncmp(at, "cpu", 3) && (at[3] == 0 || at[3] == ',')) return 1;
    }
    return 0;
}

int kt_cgroup_cpus(const char *root) {
    char path[PATH], line[PATH], mount[PATH];
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    int least = walk(root, "", "", read_v2); /* also where /proc does not tell */
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f)) { /* id:controllers:path */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        controllers++;
        int here = INT_MAX;
        if (!*controllers) {
            here = walk(root, "", group, read_v2);
        } else if (has_cpu(controllers)) {
            snprintf(mount, sizeof mount, "/%s", controllers);
            int direct = walk(root, mount, group, read_v1), linked = walk(root, "/cpu", group, read_v1);
            here = direct < linked ? direct : linked;
        }
        if (here < least) least = here;
    }
    if (f) fclose(f);
    return least;
}
#else
int kt_bind_thread(const struct kt_cpus *cpus) { return cpus == NULL; }
int kt_thread_cpus(struct kt_cpus *cpus) {
    memset(cpus, 0, sizeof *cpus);
    return 0;
}
int kt_current_cpu(void) { return -1; }
static int first_sibling(const char *root, int cpu) { return root ? cpu : -1; }
static int read_nodes(const char *root, struct kt_cpus *cpus) { return root || cpus ? 0 : -1; }
int kt_cgroup_cpus(const char *root) { return root ? INT_MAX : 1; }
#endif

/* ---- the topology ----------------------------------------------------------------------------------- */

/* "0-3,8;4-7": as read_nodes; -1 if it is no such list. */
static int parse_nodes(const char *text, struct kt_cpus *cpus) {
    for (int nodes = 0; nodes < KT_MAX_NODES; text++) {
        memset(&cpus[nodes], 0, sizeof *cpus);
        text = parse_list(text, &cpus[nodes++]);
        if (!text) return -1;
        if (!*text) return nodes;
        if (*text != ';') return -1;
    }
    return -1;
}

/* Give `cpu` to the core that its lowest sibling `first` names; a new core of `node` if there is none yet. */
static void add_cpu(struct kt_topology *t, int cpu, int first, int node, int16_t *core_of_first) {
    if (core_of_first[first] < 0) {
        core_of_first[first] = (int16_t)t->cores;
        t->core[t->cores++] = (struct kt_core){node, cpu};
    }
    t->core_of[cpu] = core_of_first[first];
}

static void add_nodes(const char *root, int nodes, const struct kt_cpus *cpus, int simulated, struct kt_topology *t) {
    int16_t core_of_first[KT_MAX_CPUS];
    memset(core_of_first, -1, sizeof core_of_first);
    for (int node = 0; node < nodes; node++) {
        t->first_core[t->nodes] = t->cores;
        for (int cpu = 0; cpu < KT_MAX_CPUS; cpu++) {
            if (!kt_cpus_have(&cpus[node], cpu) || t->core_of[cpu] >= 0) continue; /* a CPU has one node */
            if (simulated || kt_cpus_have(&t->usable, cpu))
                add_cpu(t, cpu, simulated ? cpu : first_sibling(root, cpu), t->nodes, core_of_first);
        }
        if (t->cores > t->first_core[t->nodes]) t->nodes++;
    }
    t->first_core[t->nodes] = t->cores;
}

/* CPUs that the kernel puts in no node are the last node's; without any node there is one. */
static int complete(int nodes, struct kt_cpus *cpus) {
    if (nodes < 1) {
        memset(cpus, 0, sizeof *cpus);
        nodes = 1;
    }
    for (int cpu = 0; cpu < KT_MAX_CPUS; cpu++) {
        int listed = 0;
        for (int n = 0; n < nodes; n++) listed |= kt_cpus_have(&cpus[n], cpu);
        if (!listed) kt_cpus_add(&cpus[nodes - 1], cpu);
    }
    return nodes;
}

int kt_topology_read(const char *root, const char *nodes, struct kt_topology *t) {
    memset(t, 0, sizeof *t);
    memset(t->core_of, -1, sizeof t->core_of);
    if (!kt_thread_cpus(&t->usable)) {
        long n = sysconf(_SC_NPROCESSORS_ONLN);
        for (int cpu = 0; cpu < n && cpu < KT_MAX_CPUS; cpu++) kt_cpus_add(&t->usable, cpu);
    }
    struct kt_cpus *cpus = malloc(KT_MAX_NODES * sizeof *cpus);
    if (!cpus) return KT_ERR_MEMORY;
    int found = nodes ? parse_nodes(nodes, cpus) : complete(read_nodes(root, cpus), cpus);
    if (found > 0) add_nodes(root, found, cpus, nodes != NULL, t);
    free(cpus);
    return found > 0 ? KT_OK : KT_ERR_THREADS;
}

int kt_topology_cpus(const struct kt_topology *t, int core, int node, struct kt_cpus *cpus) {
    int any = 0;
    memset(cpus, 0, sizeof *cpus);
    for (int cpu = 0; cpu < KT_MAX_CPUS; cpu++) {
        int its = t->core_of[cpu];
        if (its < 0 || !kt_cpus_have(&t->usable, cpu)) continue;
        if (core < 0 ? t->core[its].node == node : its == core) {
            kt_cpus_add(cpus, cpu);
            any = 1;
        }
    }
    return any;
}

int kt_usable_cores(const char *root) {
    struct kt_topology *t = malloc(sizeof *t);
    if (!t) return 1;
    int cores = kt_topology_read(root, NULL, t) ? 1 : t->cores, granted = kt_cgroup_cpus(root);
    free(t);
    if (granted < cores) cores = granted;
    return cores < 1 ? 1 : cores;
}
