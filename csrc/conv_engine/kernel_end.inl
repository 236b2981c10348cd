// Closes what kernel_begin.inl opened.
#if !defined(__clang__)
#pragma GCC pop_options
#endif
#undef FASTSEG_MEMBER_INLINE
#undef FASTSEG_INLINE
