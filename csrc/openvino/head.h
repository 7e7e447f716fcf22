// The operators around a vocabulary head, which share its rows: one u8 constant [V, bytes of a row].
//
//     HeadArgmax(x [..., d], codes u8 [bytes], rows, noise?) -> token i32 [...], logit f32 [...], exact i32 [...]
//     HeadSearch(x [..., d], codes u8 [bytes], rows, noise?) -> token i32 [...], state f32 [..., d]
//     PeakLogits(token i32 [...], logit f32 [...]) -> f32 [..., V], the logit at its token, minus infinity elsewhere
//     EmbedRows(ids [...], rows) -> f32 [..., d]
//
// HeadArgmax proves its token. HeadSearch takes the best of the rows that the codes' leading parts rank first, and gives
// the state on, as it read it, for a proof that comes later. noise, f32 of V numbers a state, is added to the logits; a
// single number stands for none. A state or a logit that is not finite has token -1; PeakLogits makes nothing up from it.
// Rows and codes are bytes, which OpenVINO leaves as they are; it would convert a constant of float16 to float32.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>
#include <string>
#include <vector>

#include "host.h"
#include "packed/head/host.h"
#include "weights.h"

extern "C" const char* nogemm_isa_error();  // dispatch.h, which knows the kernels

namespace nogemm {

// What a token is found by: states, codes, the head's rows and, if it is drawn, noise.
class HeadNode : public ov::op::Op {
 public:
  bool has_evaluate() const override { return true; }

 protected:
  HeadNode() = default;
  explicit HeadNode(const ov::OutputVector& inputs) : Op(inputs) {}

  struct Given {
    const char* codes;
    const float* noise;
    int64_t tokens;
    ov::Shape shape;  // of the tokens
  };

  // The shape of the tokens.
  ov::PartialShape check_inputs() const {
    NODE_VALIDATION_CHECK(this, get_input_size() == 3 || get_input_size() == 4,
                          "takes x, codes, rows and at most noise, got ", get_input_size(), " inputs");
    for (const size_t i : {size_t{1}, size_t{2}})
      NODE_VALIDATION_CHECK(this, get_input_element_type(i) == ov::element::u8, "codes and rows must be u8");
    NODE_VALIDATION_CHECK(this, get_input_size() == 3 || get_input_element_type(3) == ov::element::f32,
                          "noise must be f32");
    if (const char* error = nogemm_isa_error()) NODE_VALIDATION_CHECK(this, false, error);
    ov::PartialShape shape = get_input_partial_shape(0);
    NODE_VALIDATION_CHECK(this, shape.rank().is_static() && shape.size() > 0, "x must have a known rank and a width");
    if (const auto codes = ov::as_type_ptr<ov::op::v0::Constant>(get_input_node_shared_ptr(1))) {
      alignas(64) char header[1024] = {};
      const size_t bytes = codes->get_byte_size();
      std::memcpy(header, codes->get_data_ptr(), std::min<size_t>(bytes, sizeof header));
      check(header, static_cast<int64_t>(bytes), shape[shape.size() - 1], get_input_partial_shape(2));
    }
    shape.resize(shape.size() - 1);
    return shape;
  }

  Given given(const ov::TensorVector& inputs) const {
    const auto bytes = static_cast<int64_t>(inputs[1].get_byte_size());
    const char* codes = weights_.at(inputs[1].data(), bytes);
    Given given{codes, nullptr, 0, inputs[0].get_shape()};
    const auto d = static_cast<int64_t>(given.shape.back());
    const int64_t rows = check(codes, bytes, d, inputs[2].get_shape());
    given.shape.pop_back();
    given.tokens = static_cast<int64_t>(inputs[0].get_size()) / d;
    if (inputs.size() == 4 && inputs[3].get_size() != 1) {
      OPENVINO_ASSERT(static_cast<int64_t>(inputs[3].get_size()) == given.tokens * rows,
                      "nogemm: noise must have one number, or ", rows, " for each of ", given.tokens, " states, got ",
                      inputs[3].get_shape());
      given.noise = inputs[3].data<float>();
    }
    return given;
  }

 private:
  // How many rows there are.
  static int64_t check(const char* codes, int64_t bytes, const ov::Dimension& width, const ov::PartialShape& rows) {
    int64_t d = 0, count = 0, row_bytes = 0;
    const char* error = nogemm_head_check(codes, bytes, &d, &count, &row_bytes);
    OPENVINO_ASSERT(error == nullptr, "nogemm: this library cannot run the head: ", error);
    OPENVINO_ASSERT(width.compatible(d), "nogemm: the head takes width ", d, ", x has width ", width);
    OPENVINO_ASSERT(rows.compatible(ov::PartialShape{count, row_bytes}), "nogemm: the codes are of rows [", count, ", ",
                    row_bytes, "], got ", rows);
    return count;
  }

  mutable Weights weights_;
};

class HeadArgmax : public HeadNode {
 public:
  OPENVINO_OP("HeadArgmax", "nogemm");

  HeadArgmax() = default;
  explicit HeadArgmax(const ov::OutputVector& inputs) : HeadNode(inputs) { constructor_validate_and_infer_types(); }

  void validate_and_infer_types() override {
    const ov::PartialShape shape = check_inputs();
    set_output_type(0, ov::element::i32, shape);
    set_output_type(1, ov::element::f32, shape);
    set_output_type(2, ov::element::i32, shape);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<HeadArgmax>(inputs);
  }

  bool visit_attributes(ov::AttributeVisitor&) override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Given own = given(inputs);
    for (ov::Tensor& output : outputs) output.set_shape(own.shape);
    thread_local Scratch scratch;
    const NogemmHost host = tbb_host();
    nogemm_head_argmax(own.codes, inputs[2].data(), inputs[0].data(), type_of(inputs[0].get_element_type()), own.tokens,
                       own.noise, outputs[0].data<int32_t>(), outputs[1].data<float>(), outputs[2].data<int32_t>(),
                       scratch.at_least(nogemm_head_workspace(own.codes, own.tokens)), &host);
    scratch.trim();
    return true;
  }
};

class HeadSearch : public HeadNode {
 public:
  OPENVINO_OP("HeadSearch", "nogemm");

  HeadSearch() = default;
  explicit HeadSearch(const ov::OutputVector& inputs, int64_t best) : HeadNode(inputs), best_(best) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    ov::PartialShape shape = check_inputs();
    NODE_VALIDATION_CHECK(this, best_ > 0, "best must be at least 1, got ", best_);
    set_output_type(0, ov::element::i32, shape);
    set_output_type(1, ov::element::f32, get_input_partial_shape(0));
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<HeadSearch>(inputs, best_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("best", best_);
    return true;
  }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Given own = given(inputs);
    outputs[0].set_shape(own.shape);
    outputs[1].set_shape(inputs[0].get_shape());
    thread_local Scratch scratch;
    const NogemmHost host = tbb_host();
    nogemm_head_search(own.codes, inputs[2].data(), inputs[0].data(), type_of(inputs[0].get_element_type()), own.tokens,
                       own.noise, best_, outputs[0].data<int32_t>(), outputs[1].data<float>(),
                       scratch.at_least(nogemm_head_search_workspace(own.codes, own.tokens, best_)), &host);
    scratch.trim();
    return true;
  }

 private:
  int64_t best_ = 0;
};

class PeakLogits : public ov::op::Op {
 public:
  OPENVINO_OP("PeakLogits", "nogemm");

  PeakLogits() = default;
  explicit PeakLogits(const ov::OutputVector& inputs, int64_t vocabulary) : Op(inputs), vocabulary_(vocabulary) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    NODE_VALIDATION_CHECK(this, get_input_size() == 2, "takes tokens and logits, got ", get_input_size(), " inputs");
    ov::PartialShape shape = get_input_partial_shape(0);
    NODE_VALIDATION_CHECK(this, shape.rank().is_static() && vocabulary_ > 0, "tokens must have a known rank");
    shape.push_back(vocabulary_);
    set_output_type(0, ov::element::f32, shape);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<PeakLogits>(inputs, vocabulary_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("vocabulary", vocabulary_);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    ov::Shape shape = inputs[0].get_shape();
    shape.push_back(static_cast<size_t>(vocabulary_));
    outputs[0].set_shape(shape);
    const auto* token = inputs[0].data<int32_t>();
    const auto* logit = inputs[1].data<float>();
    auto* out = outputs[0].data<float>();
    std::fill(out, out + outputs[0].get_size(), -std::numeric_limits<float>::infinity());
    for (size_t n = 0; n < inputs[0].get_size(); ++n) {
      OPENVINO_ASSERT(token[n] >= 0 && token[n] < vocabulary_, "nogemm: the state of sequence ", n,
                      " is not finite: it has no most likely token");
      out[static_cast<int64_t>(n) * vocabulary_ + token[n]] = logit[n];
    }
    return true;
  }

 private:
  int64_t vocabulary_ = 0;
};

class EmbedRows : public ov::op::Op {
 public:
  OPENVINO_OP("EmbedRows", "nogemm");

  EmbedRows() = default;
  EmbedRows(const ov::OutputVector& inputs, int64_t dtype) : Op(inputs), dtype_(dtype) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    NODE_VALIDATION_CHECK(this, get_input_size() == 2, "takes ids and rows, got ", get_input_size(), " inputs");
    NODE_VALIDATION_CHECK(this, get_input_element_type(1) == ov::element::u8, "rows must be u8");
    NODE_VALIDATION_CHECK(this, dtype_ >= NOGEMM_X_FP32 && dtype_ <= NOGEMM_X_FP16, "unknown dtype ", dtype_);
    if (const char* error = nogemm_isa_error()) NODE_VALIDATION_CHECK(this, false, error);
    ov::PartialShape shape = get_input_partial_shape(0);
    const ov::PartialShape& rows = get_input_partial_shape(1);
    NODE_VALIDATION_CHECK(this, shape.rank().is_static() && rows.is_static() && rows.size() == 2, "unknown shapes");
    shape.push_back(rows[1].get_length() / item());
    set_output_type(0, ov::element::f32, shape);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<EmbedRows>(inputs, dtype_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("dtype", dtype_);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const auto rows = static_cast<int64_t>(inputs[1].get_shape()[0]);
    const int64_t d = static_cast<int64_t>(inputs[1].get_shape()[1]) / item();
    ov::Shape shape = inputs[0].get_shape();
    shape.push_back(static_cast<size_t>(d));
    outputs[0].set_shape(shape);
    const std::vector<int64_t> ids = whole_numbers(inputs[0]);
    for (const int64_t id : ids)
      OPENVINO_ASSERT(id >= 0 && id < rows, "nogemm: a token must be from 0 to ", rows - 1, ", got ", id);
    nogemm_head_embed(inputs[1].data(), dtype_, d, ids.data(), static_cast<int64_t>(ids.size()),
                      outputs[0].data<float>());
    return true;
  }

 private:
  int64_t item() const { return dtype_ == NOGEMM_X_FP32 ? 4 : 2; }

  static std::vector<int64_t> whole_numbers(const ov::Tensor& ids) {
    if (ids.get_element_type() == ov::element::i64) {
      const auto* own = ids.data<int64_t>();
      return {own, own + ids.get_size()};
    }
    OPENVINO_ASSERT(ids.get_element_type() == ov::element::i32, "nogemm: ids must be i32 or i64");
    const auto* own = ids.data<int32_t>();
    return {own, own + ids.get_size()};
  }

  int64_t dtype_ = 0;
};

}  // namespace nogemm
