// What bindings are made of; src/lib.rs makes them safe.
#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#ifdef QKOV_RPC
#include "ggml-rpc.h"
#endif
