// Where Metal and the CPU simulator differ. Every .metal file includes it after <metal_stdlib>; on Metal it is the whole
// of the portability layer, the simulator defines these names itself.
#ifndef METALSTEP_DIALECT_H
#define METALSTEP_DIALECT_H

#ifndef MS_SIM
// One pipeline: the kernel, or instance of a template, that hosts find by `name`.
#define MS_INSTANCE(name, ...) template [[host_name(#name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
#endif

#endif
