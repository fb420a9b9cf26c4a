/* topology.h: the cores this process may use, and the NUMA nodes they belong to. No threads here. */
#ifndef KT_TOPOLOGY_H
#define KT_TOPOLOGY_H

#include <stdint.h>

#include "threads.h"

enum { KT_MAX_CPUS = 8192 };

/* A set of CPUs, laid out as the kernel's affinity calls want it. */
struct kt_cpus {
    unsigned long bits[KT_MAX_CPUS / (8 * sizeof(long))];
};

/* One physical core: the hardware threads of it that this process may use share its units, so it counts once. */
struct kt_core {
    int32_t node; /* 0..nodes-1, dense: nodes without a usable core do not count */
    int32_t cpu;  /* its lowest usable hardware thread */
};

struct kt_topology {
    int nodes, cores;
    struct kt_cpus usable;              /* the calling thread's affinity mask */
    struct kt_core core[KT_MAX_CPUS];   /* [cores], by node and then by cpu */
    int16_t core_of[KT_MAX_CPUS];       /* cpu -> index into core, -1 if not usable */
    int32_t first_core[KT_MAX_NODES + 1]; /* cores of node n: first_core[n] .. first_core[n + 1] */
};

/* Discover the machine. `nodes` NULL: nodes as the kernel reports them; otherwise "0-3,8;4-7", the CPUs of node 0, of
 * node 1 ..., each counted as a core, whether or not this machine has it: that is how tests simulate a topology.
 * `root` is put before every path that is read; "" outside tests. KT_ERR_THREADS if `nodes` is no such list. */
int kt_topology_read(const char *root, const char *nodes, struct kt_topology *t);

/* CPUs' worth of time that the cgroup and those around it grant, rounded up; INT32_MAX without a limit. */
int kt_cgroup_cpus(const char *root);

/* Cores this process may use within its cgroup's quota, at least 1. */
int kt_usable_cores(const char *root);

/* The CPUs of one core, or with core -1 of one node, that the process may use; 0 if there are none. */
int kt_topology_cpus(const struct kt_topology *t, int core, int node, struct kt_cpus *cpus);

/* Affinity of the calling thread: 1 if the kernel accepted it. */
int kt_bind_thread(const struct kt_cpus *cpus);
int kt_thread_cpus(struct kt_cpus *cpus);
int kt_current_cpu(void); /* -1 if unknown */

static inline int kt_cpus_have(const struct kt_cpus *s, int cpu) {
    return s->bits[(unsigned)cpu / (8 * sizeof(long))] >> ((unsigned)cpu % (8 * sizeof(long))) & 1;
}
static inline void kt_cpus_add(struct kt_cpus *s, int cpu) {
    s->bits[(unsigned)cpu / (8 * sizeof(long))] |= 1ul << ((unsigned)cpu % (8 * sizeof(long)));
}

#endif
