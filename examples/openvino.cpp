// Runs an exported model without Python: openvino EXPORT_DIRECTORY TOKEN_ID... [/ TOKEN_ID...]
//
// Tokens behind "/" are of the second type: the second text of a pair, for models that tell the two apart.
//
//   g++ -std=c++17 openvino.cpp -I$OPENVINO/include -L$OPENVINO/libs -l:libopenvino.so.VERSION -o openvino
//
// with OPENVINO the folder of the Python package (`python -c "import openvino; print(openvino.__path__[0])"`) or of an
// archive of the same release.
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <map>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("usage: openvino EXPORT_DIRECTORY TOKEN_ID... [/ TOKEN_ID...]");
  const std::string folder = argv[1];
  ov::Core core;
  core.add_extension(folder + "/libnogemm_openvino.so");
  ov::CompiledModel model = core.compile_model(folder + "/openvino_model.xml", "CPU");
  ov::InferRequest request = model.create_infer_request();

  std::map<std::string, std::vector<int64_t>> rows;
  int64_t type = 0;
  for (int i = 2; i < argc; ++i) {
    if (argv[i] == std::string("/")) {
      type = 1;
      continue;
    }
    rows["input_ids"].push_back(std::atoll(argv[i]));
    rows["attention_mask"].push_back(1);
    rows["token_type_ids"].push_back(type);
  }
  const ov::Shape shape{1, rows["input_ids"].size()};
  for (const auto& input : model.inputs()) {  // all of them: nogemm_export.json has their names, too
    const std::string name = input.get_any_name();
    request.set_tensor(name, ov::Tensor(ov::element::i64, shape, rows.at(name).data()));
  }
  request.infer();

  // A hidden state has a row per token, of which this prints the first number; logits of a text are one row.
  const ov::Tensor output = request.get_output_tensor();
  const size_t step = output.get_shape().size() == 3 ? output.get_shape().back() : 1;
  for (size_t at = 0; at < output.get_size(); at += step)
    std::cout << output.data<float>()[at] << (at + step < output.get_size() ? ' ' : '\n');
} catch (const std::exception& error) {
  std::cerr << "openvino: " << error.what() << '\n';
  return 1;
}
