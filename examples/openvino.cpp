// Runs an exported model without Python: openvino EXPORT_DIRECTORY TOKEN_ID...
//
//   g++ -std=c++17 openvino.cpp -I$OPENVINO/include -L$OPENVINO/libs -l:libopenvino.so.VERSION -o openvino
//
// with OPENVINO the folder of the Python package (`python -c "import openvino; print(openvino.__path__[0])"`) or of an
// archive of the same release.
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("usage: openvino EXPORT_DIRECTORY TOKEN_ID...");
  const std::string folder = argv[1];
  ov::Core core;
  core.add_extension(folder + "/libnogemm_openvino.so");
  ov::InferRequest request = core.compile_model(folder + "/openvino_model.xml", "CPU").create_infer_request();

  std::vector<int64_t> ids, mask(static_cast<size_t>(argc - 2), 1);
  for (int i = 2; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
  const ov::Shape shape{1, ids.size()};
  request.set_tensor("input_ids", ov::Tensor(ov::element::i64, shape, ids.data()));
  request.set_tensor("attention_mask", ov::Tensor(ov::element::i64, shape, mask.data()));
  request.infer();

  const ov::Tensor hidden = request.get_output_tensor();
  const size_t width = hidden.get_shape().back();
  for (size_t token = 0; token < ids.size(); ++token)
    std::cout << hidden.data<float>()[token * width] << (token + 1 < ids.size() ? ' ' : '\n');
} catch (const std::exception& error) {
  std::cerr << "openvino: " << error.what() << '\n';
  return 1;
}
