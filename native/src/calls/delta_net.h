/* delta_net.h: a kt_delta_net's call inside another. */
#ifndef KT_DELTA_NET_H
#define KT_DELTA_NET_H

#include "rows.h"

/* H */
int64_t kt_delta_net_hidden(const kt_delta_net *net);

/* KT_OK where its numbers are in range and nothing of it is missing. */
int kt_delta_net_check(const kt_delta_net_call *call);

/* kt_delta_net_forward of a checked call with the pool locked by the caller, from any rows to any sum. */
int kt_delta_net_run(const kt_delta_net *net, kt_pool *pool, const kt_delta_net_call *call, const struct kt_rows *in,
                     const struct kt_sum *out);

#endif
