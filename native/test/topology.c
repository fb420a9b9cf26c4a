/* topology.c: prints what ../src/topology.c finds under a root folder that a test made up: `topology ROOT [NODES]`.
 * Built and run by tests/native/test_threads.py. */
#include "../src/threads/topology.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    static struct kt_topology t;
    if (argc < 2) return 2;
    int status = kt_topology_read(argv[1], argc > 2 ? argv[2] : NULL, &t);
    printf("status %d\ncgroup %d\ncores %d\n", status, kt_cgroup_cpus(argv[1]), kt_usable_cores(argv[1]));
    for (int i = 0; i < t.cores; i++) printf("core %d node %d\n", t.core[i].cpu, t.core[i].node);
    return 0;
}
