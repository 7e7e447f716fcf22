// The packed layers as an OpenVINO operator: compiled once against the OpenVINO that is installed, linked with the
// torch-free kernels, loaded with ov::Core::add_extension. The operators of vocabulary heads are in head.h.
//
// nogemm::PackedFFN(x [..., d], packed u8 [bytes]) -> y [..., d_out] in x's type. `packed` is the buffer that the packers
// make, the same for every instruction set; see weights.h for where it is read.
#include <cstdint>
#include <cstring>
#include <memory>
#include <openvino/core/except.hpp>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>
#include <string>
#include <vector>

#include "head.h"
#include "host.h"
#include "packed/lookup/pack.h"
#include "packed/neurons/host.h"
#include "packed/tree/pack.h"
#include "weights.h"

extern "C" const char* nogemm_isa_error();  // dispatch.h, which knows the kernels

namespace {

// What a kind of packed layer answers to; see packed/lookup/pack.h. A buffer is tried with each until one knows its header.
struct Kind {
  const char* (*check)(const void* packed, int64_t bytes, int64_t* d, int64_t* d_out);
  const char* (*check_body)(const void* packed);  // null: nothing behind the header can lead astray
  int64_t (*workspace)(const void* packed, int64_t tokens, int64_t threads);
  void (*forward)(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y, int64_t tokens,
                  void* workspace, const NogemmHost* host);
};
constexpr Kind kKinds[] = {
    {nogemm_lookup_check, nullptr, nogemm_lookup_workspace, nogemm_lookup_forward},
    {nogemm_tree_check, nullptr, nogemm_tree_workspace, nogemm_tree_forward},
    {nogemm_hire_check, nogemm_hire_check_body, nogemm_hire_workspace, nogemm_hire_forward},
};

class PackedFFN : public ov::op::Op {
 public:
  OPENVINO_OP("PackedFFN", "nogemm");

  PackedFFN() = default;
  explicit PackedFFN(const ov::OutputVector& inputs, int64_t d_out) : Op(inputs), d_out_(d_out) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    NODE_VALIDATION_CHECK(this, get_input_size() == 2, "takes x and a packed layer, got ", get_input_size(), " inputs");
    NODE_VALIDATION_CHECK(this, get_input_element_type(1) == ov::element::u8, "the packed layer must be u8");
    if (const char* error = nogemm_isa_error()) NODE_VALIDATION_CHECK(this, false, error);
    ov::PartialShape shape = get_input_partial_shape(0);
    NODE_VALIDATION_CHECK(this, shape.rank().is_dynamic() || shape.size() > 0, "x must have a width, got a scalar");
    // Here, when the model is read, rather than in the first inference: a dynamic graph may swallow what evaluate throws.
    if (const auto layer = ov::as_type_ptr<ov::op::v0::Constant>(get_input_node_shared_ptr(1))) {
      const int64_t d = check_constant(layer->get_data_ptr(), static_cast<int64_t>(layer->get_byte_size()));
      if (shape.rank().is_static()) check_width(shape[shape.size() - 1], d);
    }
    if (shape.rank().is_static()) shape[shape.size() - 1] = d_out_;
    set_output_type(0, get_input_element_type(0), shape);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<PackedFFN>(inputs, d_out_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("d_out", d_out_);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const ov::Tensor& x = inputs[0];
    const char* packed = weights_.at(inputs[1].data(), static_cast<int64_t>(inputs[1].get_byte_size()));
    int64_t d = 0;
    const Kind& kind = kind_of(packed, static_cast<int64_t>(inputs[1].get_byte_size()), d);
    const char* error = kind.check_body == nullptr ? nullptr : kind.check_body(packed);
    OPENVINO_ASSERT(error == nullptr, "nogemm: this library cannot run the packed layer: ", error);
    ov::Shape shape = x.get_shape();
    OPENVINO_ASSERT(!shape.empty(), "nogemm: x must have a width, got a scalar");
    check_width(static_cast<int64_t>(shape.back()), d);
    shape.back() = static_cast<size_t>(d_out_);
    outputs[0].set_shape(shape);
    const int64_t tokens = static_cast<int64_t>(x.get_size()) / d;
    thread_local nogemm::Scratch scratch;
    const NogemmHost host = nogemm::tbb_host();
    kind.forward(packed, x.data(), nogemm::type_of(x.get_element_type()), d, outputs[0].data(), tokens,
                 scratch.at_least(kind.workspace(packed, tokens, host.threads)), &host);
    scratch.trim();
    return true;
  }

 private:
  const Kind& kind_of(const char* packed, int64_t bytes, int64_t& d) const {
    std::string error;
    for (const Kind& kind : kKinds) {
      int64_t d_out = 0;
      if (const char* wrong = kind.check(packed, bytes, &d, &d_out)) {
        // A kind that does not know the header says no more than that; the one that does says what is wrong.
        if (error.empty() || error.rfind("not a packed", 0) == 0) error = wrong;
        continue;
      }
      OPENVINO_ASSERT(d_out == d_out_, "nogemm: the packed layer gives width ", d_out, ", d_out is ", d_out_);
      return kind;
    }
    OPENVINO_THROW("nogemm: this library cannot run the packed layer of node ", get_friendly_name(), ": ", error);
  }

  // Width of x. Constants lie anywhere in a file, and a header is all that is looked at: an aligned copy of it will do.
  int64_t check_constant(const void* packed, int64_t bytes) const {
    alignas(64) char header[1024] = {};
    std::memcpy(header, packed, static_cast<size_t>(bytes < 1024 ? bytes : 1024));
    int64_t d = 0;
    kind_of(header, bytes, d);
    return d;
  }

  void check_width(const ov::Dimension& width, int64_t d) const {
    OPENVINO_ASSERT(width.compatible(d), "nogemm: the packed layer takes width ", d, ", x has width ", width);
  }

  mutable nogemm::Weights weights_;
  int64_t d_out_ = 0;
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<PackedFFN>>(),
    std::make_shared<ov::OpExtension<nogemm::HeadArgmax>>(),
    std::make_shared<ov::OpExtension<nogemm::HeadSearch>>(),
    std::make_shared<ov::OpExtension<nogemm::PeakLogits>>(),
    std::make_shared<ov::OpExtension<nogemm::EmbedRows>>(),
}));
