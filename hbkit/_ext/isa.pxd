from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "decode.h" nogil:
    ctypedef struct hb_runs:
        const uint8_t *at
        const uint8_t *end
        const uint8_t *packed
        int64_t left, done
        uint32_t value
        int32_t width

    ctypedef struct hb_span:
        uint32_t at, n

    ctypedef struct hb_short:
        uint8_t n
        uint8_t *bytes

    ctypedef struct hb_decoders:
        int (*runs_read)(hb_runs *, uint32_t *, int64_t) noexcept nogil
        int (*runs_bits)(hb_runs *, uint64_t *, int64_t) noexcept nogil
        int (*runs_levels)(hb_runs *, int64_t, uint32_t, uint32_t, uint32_t, uint64_t *, uint64_t *,
                           uint64_t *) noexcept nogil
        int (*runs_same)(hb_runs *, int64_t, uint32_t *) noexcept nogil
        int (*runs_skip)(hb_runs *, int64_t) noexcept nogil
        int (*gather8)(const uint32_t *, int64_t, const uint64_t *, int64_t, uint64_t *) noexcept nogil
        int (*gather4)(const uint32_t *, int64_t, const uint32_t *, int64_t, uint32_t *) noexcept nogil
        int (*gather2)(const uint32_t *, int64_t, const uint16_t *, int64_t, uint16_t *) noexcept nogil
        int (*gather1)(const uint32_t *, int64_t, const uint8_t *, int64_t, uint8_t *) noexcept nogil
        uint32_t (*at_least)(const uint32_t *, int64_t, uint32_t, uint64_t *) noexcept nogil
        int (*gather8_past_cache)(const uint32_t *, int64_t, const uint64_t *, int64_t, uint64_t *) noexcept nogil
        int (*gather4_past_cache)(const uint32_t *, int64_t, const uint32_t *, int64_t, uint32_t *) noexcept nogil
        void (*copy_past_cache)(void *, const void *, int64_t) noexcept nogil
        int64_t (*count_bits)(const uint64_t *, int64_t, int64_t) noexcept nogil
        int64_t (*row_starts)(const uint64_t *, const uint64_t *, int64_t, int64_t, int64_t, int64_t, int64_t *,
                              int64_t *) noexcept nogil
        int64_t (*expand)(const uint64_t *, const uint64_t *, int64_t, int64_t, const void *, int64_t, uint64_t,
                          void *, int) noexcept nogil
        int64_t (*delta)(const uint8_t *, const uint8_t *, int64_t, int64_t, void *, int64_t *) noexcept nogil
        void (*unsplit)(const uint8_t *, int64_t, int64_t, uint8_t *) noexcept nogil
        void (*resize4)(const int32_t *, int64_t, int64_t, void *) noexcept nogil
        void (*bits_to_bytes)(const uint8_t *, int64_t, int64_t, uint8_t *) noexcept nogil
        int64_t (*strings_plain)(const uint8_t *, const uint8_t *, int64_t, int64_t *, uint8_t *) noexcept nogil
        int64_t (*strings_hash)(const uint8_t *, const uint8_t *, int64_t, uint64_t, int64_t *) noexcept nogil
        int64_t (*strings_size)(const uint32_t *, int64_t, const hb_span *, int64_t) noexcept nogil
        int64_t (*strings_short)(const uint8_t *, const uint8_t *, int64_t, hb_short *) noexcept nogil
        int (*strings_gather_short)(const uint32_t *, int64_t, const hb_short *, int64_t, int64_t *,
                                    uint8_t *) noexcept nogil
        void (*strings_gather)(const uint32_t *, int64_t, const hb_span *, const uint8_t *, int64_t *,
                               uint8_t *) noexcept nogil

    int HB_SLACK, HB_CODES, HB_SHORT, HB_E_END, HB_E_FORMAT, HB_E_RANGE


cdef extern from "index.h" nogil:
    ctypedef struct hb_index:
        int64_t n, next_slot, nbytes
        uint64_t **free_bits
        int64_t room_pages, n_free
        int64_t *countdown

    ctypedef struct hb_indexers:
        int (*create)(hb_index *, int64_t) noexcept nogil
        void (*destroy)(hb_index *) noexcept nogil
        void (*find)(const hb_index *, const int64_t *, int64_t, int64_t *) noexcept nogil
        int (*insert)(hb_index *, const int64_t *, int64_t, int64_t *, uint8_t *) noexcept nogil
        int (*erase)(hb_index *, const int64_t *, int64_t, int64_t *) noexcept nogil
        void (*take_back)(hb_index *, const int64_t *, int64_t, const uint8_t *, int64_t) noexcept nogil
        int64_t (*items)(const hb_index *, int64_t, int64_t *, int64_t *) noexcept nogil
        int64_t (*part)(const hb_index *, uint64_t, uint64_t, const uint64_t *, int64_t, int64_t,
                        int64_t *) noexcept nogil
        const char *(*validate)(const hb_index *) noexcept nogil
        int64_t (*dedupe)(const int64_t *, int64_t, uint32_t *, int, int64_t *, void *, int, int64_t *) noexcept nogil
        int (*put)(hb_index *, const int64_t *, int64_t, const int64_t *, int64_t *) noexcept nogil
        void (*drop)(hb_index *, const int64_t *, int64_t, int64_t *) noexcept nogil

    int HB_PAGE


cdef extern from "kernels.h" nogil:
    ctypedef struct hb_slabs:
        char **chunks
        int64_t dim, n_state, row_stride, state_stride, state_at
        int32_t shift, dtype

    ctypedef struct hb_gradients:
        const float *values
        int64_t dim, n_segments
        const int32_t *order
        const int32_t *starts
        const int64_t *rows
        const float *scale

    ctypedef struct hb_part:
        int64_t rule, column, dim, state
        const float *hyper

    ctypedef struct hb_update:
        const int64_t *slots
        hb_gradients g
        const hb_part *parts
        int64_t n_parts
        int32_t skip
        const int64_t *keys
        uint64_t seed
        uint32_t step
        void *scratch

    ctypedef struct hb_draw:
        int64_t kind, column, dim
        double a, b
        uint64_t seed

    ctypedef struct hb_packing:
        const float *rows
        int64_t n, dim
        int32_t wire
        float *residual
        const int64_t *keys
        uint64_t seed
        uint32_t step
        void *scratch

    ctypedef struct hb_wires:
        void (*pack)(const hb_packing *, uint8_t *) noexcept nogil
        void (*unpack)(const uint8_t *, int64_t, int64_t, int, float *) noexcept nogil

    ctypedef struct hb_feature:
        int64_t at
        const int32_t *inverse
        const float **rows
        float *sums
        float *blocks
        int32_t *seen

    ctypedef struct hb_kernels:
        const char *name
        void (*gather)(const hb_slabs *, const int64_t *, const int64_t *, int64_t, int64_t, float *) noexcept nogil
        void (*scatter)(const hb_slabs *, const int64_t *, int64_t, int64_t, int64_t, const float *,
                        int64_t) noexcept nogil
        void (*expand)(const float *, const int64_t *, int64_t, int64_t, float *) noexcept nogil
        void (*pool)(const float *, const int64_t *, const int64_t *, const float *, const float *, int64_t, int64_t,
                     float *) noexcept nogil
        int (*pool_slots)(const hb_slabs *, const int64_t *, const int64_t *, const int64_t *, const float *,
                          const float *, int64_t, float *) noexcept nogil
        void (*segment_sum)(const hb_gradients *, float *) noexcept nogil
        int64_t (*apply)(const hb_slabs *, const hb_update *) noexcept nogil
        int64_t (*count_bad)(const float *, int64_t, int64_t) noexcept nogil
        int (*initialize)(const hb_draw *, const int64_t *, int64_t, float *, int64_t) noexcept nogil
        const hb_decoders *decode
        int (*snappy)(const uint8_t *, int64_t, uint8_t *, int64_t) noexcept nogil
        const hb_indexers *index
        const hb_wires *wire
        void (*locate)(const hb_slabs *, const int64_t *, int64_t, const float **) noexcept nogil
        void (*gather_together)(const hb_feature *, int64_t, int64_t, int64_t, int64_t, float *,
                                int64_t) noexcept nogil
        int (*sum_together)(const hb_feature *, int64_t, int64_t, int64_t, const float *, int64_t) noexcept nogil
        void (*finish_sums)(const hb_feature *, const int64_t *, int64_t, int64_t) noexcept nogil
        void (*read_lines)(const hb_slabs *, const int64_t *, int64_t, float *) noexcept nogil
        void (*write_lines)(const hb_slabs *, const int64_t *, int64_t, const float *) noexcept nogil
        int (*sum_some)(const hb_feature *, int64_t, int64_t, int64_t, int64_t, const float *, int64_t) noexcept nogil

    ctypedef struct hb_fp_state:
        pass
    hb_fp_state hb_fp_enter()
    void hb_fp_leave(hb_fp_state)
    void hb_philox(const uint32_t *, const uint32_t *, uint32_t *)
    uint64_t hb_mix64(uint64_t)
    int HB_HYPER, HB_RULES
    size_t HB_SCRATCH(int64_t)
    size_t HB_WIRE_SCRATCH(int64_t)

cdef const hb_kernels *kernels() noexcept nogil
