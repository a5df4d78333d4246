// vi_simsiam._C: the compiled backends of the multi-view loss on raw addresses.
//
// No torch header is included, so one binary serves every torch release. The Python side validates shapes,
// dtypes and devices; here addresses are integers (tensor.data_ptr()) and strides count elements.

#include "multiview_loss.h"
#include "power_spherical.cuh"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace py = pybind11;

namespace {

using vi_simsiam::DType;
using vi_simsiam::MultiviewProblem;
using Strides = std::pair<int64_t, int64_t>;  // from view to view, from sample to sample

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, not " + name);
}

MultiviewProblem make_problem(uintptr_t predictions, uintptr_t targets, uintptr_t loss, uintptr_t gradient,
                              int64_t views, int64_t target_views, int64_t batch, int64_t dim,
                              const Strides& prediction_strides, const Strides& target_strides,
                              const Strides& gradient_strides, bool power_spherical, double scale,
                              double minimum) {
  MultiviewProblem problem{};
  problem.predictions = reinterpret_cast<const void*>(predictions);
  problem.targets = reinterpret_cast<const void*>(targets);
  problem.loss = reinterpret_cast<void*>(loss);
  problem.gradient = reinterpret_cast<void*>(gradient);
  problem.views = views;
  problem.target_views = target_views;
  problem.batch = batch;
  problem.dim = dim;
  problem.prediction_strides[0] = prediction_strides.first;
  problem.prediction_strides[1] = prediction_strides.second;
  problem.target_strides[0] = target_strides.first;
  problem.target_strides[1] = target_strides.second;
  problem.gradient_strides[0] = gradient_strides.first;
  problem.gradient_strides[1] = gradient_strides.second;
  problem.power_spherical = power_spherical;
  problem.scale = scale;
  problem.minimum = minimum;
  return problem;
}

void multiview_loss_cpu(uintptr_t predictions, uintptr_t targets, uintptr_t loss, uintptr_t gradient,
                        int64_t views, int64_t target_views, int64_t batch, int64_t dim,
                        const Strides& prediction_strides, const Strides& target_strides,
                        const Strides& gradient_strides, bool power_spherical, double scale, double minimum,
                        const std::string& dtype, int threads) {
  const DType type = parse_dtype(dtype);
  if (type != DType::float32 && type != DType::float64)
    throw std::invalid_argument("dtype must be float32 or float64, not " + dtype);
  const MultiviewProblem problem =
      make_problem(predictions, targets, loss, gradient, views, target_views, batch, dim, prediction_strides,
                   target_strides, gradient_strides, power_spherical, scale, minimum);
  py::gil_scoped_release release;
  vi_simsiam::multiview_loss_cpu(problem, type, threads);
}

#if defined(VI_SIMSIAM_CUDA)
void multiview_loss_cuda(uintptr_t predictions, uintptr_t targets, uintptr_t loss, uintptr_t gradient,
                         int64_t views, int64_t target_views, int64_t batch, int64_t dim,
                         const Strides& prediction_strides, const Strides& target_strides,
                         const Strides& gradient_strides, bool power_spherical, double scale, double minimum,
                         const std::string& prediction_dtype, const std::string& target_dtype,
                         const std::string& gradient_dtype, uintptr_t stream) {
  const DType prediction = parse_dtype(prediction_dtype), target = parse_dtype(target_dtype),
              grad = parse_dtype(gradient_dtype);
  const MultiviewProblem problem =
      make_problem(predictions, targets, loss, gradient, views, target_views, batch, dim, prediction_strides,
                   target_strides, gradient_strides, power_spherical, scale, minimum);
  const char* error = nullptr;
  {
    py::gil_scoped_release release;
    error =
        vi_simsiam::multiview_loss_cuda(problem, prediction, target, grad, reinterpret_cast<void*>(stream));
  }
  if (error != nullptr) throw std::runtime_error(std::string("multiview_loss_cuda: ") + error);
}
#endif

template <typename Real>
py::tuple power_spherical_terms(const py::array_t<Real, py::array::c_style>& kappa,
                                const py::array_t<Real, py::array::c_style>& cosine, int64_t dim) {
  if (kappa.size() != cosine.size())
    throw std::invalid_argument("kappa and cosine must have the same number of elements");
  const vi_simsiam::PowerSpherical<Real> density(dim);
  const py::ssize_t size = kappa.size();
  py::array_t<Real> value(size), d_kappa(size), d_cos(size);
  for (py::ssize_t i = 0; i < size; ++i) {
    const auto terms = density.with_concentration(kappa.data()[i]).at(cosine.data()[i]);
    value.mutable_data()[i] = terms.value;
    d_kappa.mutable_data()[i] = terms.d_kappa;
    d_cos.mutable_data()[i] = terms.d_cos;
  }
  return py::make_tuple(value, d_kappa, d_cos);
}

std::string compiler() {
#if defined(__clang__)
  return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#elif defined(__GNUC__)
  return "gcc " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

#define VI_STRING_OF(...) #__VA_ARGS__
#define VI_STRING(...) VI_STRING_OF(__VA_ARGS__)

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["simd"] = vi_simsiam::cpu_variant();
  info["cuda"] = py::none();
  info["architectures"] = py::list();
#if defined(VI_SIMSIAM_CUDA)
  const int version = vi_simsiam::cuda_toolkit_version();
  info["cuda"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["architectures"] =
      py::str(VI_STRING(VI_SIMSIAM_CUDA)).attr("split")(",");  // setup.py defines it as 8.0,9.0+PTX
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled backends of the multi-view loss, on raw addresses and strides.";

  m.def("multiview_loss_cpu", &multiview_loss_cpu, py::arg("predictions"), py::arg("targets"),
        py::arg("loss"), py::arg("gradient"), py::arg("views"), py::arg("target_views"), py::arg("batch"),
        py::arg("dim"), py::arg("prediction_strides"), py::arg("target_strides"), py::arg("gradient_strides"),
        py::arg("power_spherical"), py::arg("scale"), py::arg("minimum"), py::arg("dtype"),
        py::arg("threads"),
        "Writes the loss (batch,) and, unless gradient is 0, the gradient of the predictions, for addresses "
        "in host memory.");

#if defined(VI_SIMSIAM_CUDA)
  m.def("multiview_loss_cuda", &multiview_loss_cuda, py::arg("predictions"), py::arg("targets"),
        py::arg("loss"), py::arg("gradient"), py::arg("views"), py::arg("target_views"), py::arg("batch"),
        py::arg("dim"), py::arg("prediction_strides"), py::arg("target_strides"), py::arg("gradient_strides"),
        py::arg("power_spherical"), py::arg("scale"), py::arg("minimum"), py::arg("prediction_dtype"),
        py::arg("target_dtype"), py::arg("gradient_dtype"), py::arg("stream"),
        "Enqueues the same computation on a stream of the current device; raises RuntimeError with the "
        "launch error.");
#endif

  m.def("power_spherical_terms", &power_spherical_terms<float>, py::arg("kappa").noconvert(),
        py::arg("cosine").noconvert(), py::arg("dim"),
        "(F, dF/dkappa, dF/dcosine) of float32 arrays, by the code that the CPU and CUDA backends share.");
  m.def("power_spherical_terms", &power_spherical_terms<double>, py::arg("kappa").noconvert(),
        py::arg("cosine").noconvert(), py::arg("dim"), "The same of float64 arrays.");
  m.def("build_info", &build_info,
        "Compiler, vector instructions chosen on this machine, CUDA version (or None), architectures.");
}
