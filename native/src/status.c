#include "../include/kt_native.h"

const char *kt_status_message(int status) {
    switch (status) {
    case KT_OK: return "success";
    case KT_ERR_NULL: return "a required pointer is NULL";
    case KT_ERR_TYPE: return "weight type unknown to this library";
    case KT_ERR_SHAPE: return "a size is out of range, or matrices do not fit together";
    case KT_ERR_BLOCK: return "columns are not a multiple of the weight type's block";
    case KT_ERR_BYTES: return "byte length differs from what rows, columns and type need";
    case KT_ERR_DTYPE: return "activation dtype unknown (float32, float16 or bfloat16)";
    case KT_ERR_ACTIVATION: return "activation function unknown";
    case KT_ERR_MEMORY: return "out of memory";
    case KT_ERR_THREADS: return "thread count out of range, or threads cannot be started";
    case KT_ERR_ISA: return "instruction set unknown, not built, or not available on this machine";
    case KT_ERR_SCALES: return "separate scales, zero points or column order do not fit the weight type";
    case KT_ERR_ROUTER: return "unknown way of scoring, choosing or weighing experts, or a cap that is no number";
    case KT_ERR_VALUE: return "the weights hold NaN or infinity, or an importance is no number from 0 on";
    case KT_ERR_RANGE: return "a number is too large for the type";
    case KT_ERR_CLOSED: return "the queue was closed before it was done";
    }
    return "unknown status";
}
