// The loops of the permutohedral filter and of mean field, once per instruction set.
// clang-format off: a file needs those before it
#include "permutohedral/registers.inl"
#include "permutohedral/locate_kernel.inl"
#include "permutohedral/single_channel_kernel.inl"
#include "permutohedral/filter_kernel.inl"
#include "permutohedral/rows_kernel.inl"
#include "permutohedral/softmax_kernel.inl"
// clang-format on
