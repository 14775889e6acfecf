from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "kernels.h" nogil:
    ctypedef struct hb_slabs:
        float **chunks
        int64_t width
        int32_t shift

    float *hb_line(const hb_slabs *, int64_t)

    ctypedef struct hb_kernels:
        const char *name
        void (*gather)(const hb_slabs *, const int64_t *, int64_t, int64_t, float *) noexcept nogil
        void (*pool)(const float *, const int64_t *, const int64_t *, const float *, const float *, int64_t, int64_t,
                     float *) noexcept nogil
        void (*segment_sum)(const float *, const int64_t *, const float *, const int64_t *, const int64_t *, int64_t,
                            int64_t, float *) noexcept nogil
        int (*apply)(int, const hb_slabs *, const int64_t *, int64_t, int64_t, const float *,
                     const float *) noexcept nogil
        int (*initialize)(int, double, double, uint64_t, const int64_t *, int64_t, int64_t, float *) noexcept nogil
        int (*snappy)(const uint8_t *, int64_t, uint8_t *, int64_t) noexcept nogil

    ctypedef struct hb_fp_state:
        pass
    hb_fp_state hb_fp_enter()
    void hb_fp_leave(hb_fp_state)
    void hb_philox(const uint32_t *, const uint32_t *, uint32_t *)
    uint64_t hb_mix64(uint64_t)
    int HB_HYPER

cdef const hb_kernels *kernels() noexcept nogil
