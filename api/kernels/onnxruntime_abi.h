/* The few parts of ONNX Runtime's C interface that a custom operator needs.
 *
 * The Python wheel has the library but no header. The interface is a table of function pointers that only
 * grows at its end (the numbers are positions in it), and a structure of callbacks with a version in front,
 * so declaring the used parts is safe with every later ONNX Runtime.
 */
#ifndef ASR_ONNXRUNTIME_ABI_H
#define ASR_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtCustomOp OrtCustomOp;

/* From this version on kernels may refuse with a status. */
#define ORT_ABI_VERSION 16

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT32 = 6, ORT_INT64 = 7 };
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

typedef struct {
  const void *slots[276];
} OrtApi;

typedef struct {
  const OrtApi *(*get_api)(uint32_t version);
  const char *(*get_version)(void);
} OrtApiBase;

struct OrtCustomOp {
  uint32_t version;
  void *(*create_kernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*get_name)(const OrtCustomOp *);
  const char *(*get_provider)(const OrtCustomOp *);
  int (*get_input_type)(const OrtCustomOp *, size_t index);
  size_t (*get_input_count)(const OrtCustomOp *);
  int (*get_output_type)(const OrtCustomOp *, size_t index);
  size_t (*get_output_count)(const OrtCustomOp *);
  void (*compute)(void *kernel, OrtKernelContext *);
  void (*destroy)(void *kernel);
  int (*get_input_kind)(const OrtCustomOp *, size_t index);
  int (*get_output_kind)(const OrtCustomOp *, size_t index);
  int (*get_input_memory)(const OrtCustomOp *, size_t index);
  int (*variadic[4])(const OrtCustomOp *);
  OrtStatus *(*create_kernel_v2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
  OrtStatus *(*compute_v2)(void *kernel, OrtKernelContext *);
};

/* ORT_CALL(api, name)(...): a function of the table with its type. */
#define ORT_CALL(api, name) ((ort_##name)(api)->slots[ORT_SLOT_##name])
#define ORT_FUNCTION(slot, result, name, ...) \
  enum { ORT_SLOT_##name = slot };            \
  typedef result (*ort_##name)(__VA_ARGS__);

ORT_FUNCTION(0, OrtStatus *, create_status, int code, const char *message)
ORT_FUNCTION(26, OrtStatus *, create_domain, const char *name, OrtCustomOpDomain **)
ORT_FUNCTION(27, OrtStatus *, domain_add, OrtCustomOpDomain *, const OrtCustomOp *)
ORT_FUNCTION(28, OrtStatus *, add_domain, OrtSessionOptions *, OrtCustomOpDomain *)
ORT_FUNCTION(51, OrtStatus *, tensor_data, OrtValue *, void **)
ORT_FUNCTION(61, OrtStatus *, dimension_count, const OrtShape *, size_t *)
ORT_FUNCTION(62, OrtStatus *, dimensions, const OrtShape *, int64_t *, size_t count)
ORT_FUNCTION(65, OrtStatus *, tensor_shape, const OrtValue *, OrtShape **)
ORT_FUNCTION(90, OrtStatus *, context_input, const OrtKernelContext *, size_t index, const OrtValue **)
ORT_FUNCTION(91, OrtStatus *, context_output, OrtKernelContext *, size_t index, const int64_t *dimensions,
             size_t count, OrtValue **)
ORT_FUNCTION(93, void, release_status, OrtStatus *)
ORT_FUNCTION(99, void, release_shape, OrtShape *)
ORT_FUNCTION(163, OrtStatus *, info_int64s, const OrtKernelInfo *, const char *name, int64_t *, size_t *count)
ORT_FUNCTION(230, OrtStatus *, info_input_count, const OrtKernelInfo *, size_t *)
ORT_FUNCTION(249, OrtStatus *, info_constant, const OrtKernelInfo *, size_t index, int *is_constant,
             const OrtValue **)
ORT_FUNCTION(274, OrtStatus *, parallel_for, const OrtKernelContext *, void (*task)(void *, size_t),
             size_t total, size_t batches, void *data)

#endif
