// vi_simsiam._C: the compiled backends of the multi-view loss and of BatchNorm on raw addresses.
//
// No torch header is included, so one binary serves every torch release. The Python side validates
// shapes, dtypes and devices; here addresses are integers (tensor.data_ptr()) and strides count
// elements.

#include "batch_norm.h"
#include "multiview_loss.h"
#include "power_spherical.cuh"
#include "simd.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using vi_simsiam::BatchNormProblem;
using vi_simsiam::DType;
using vi_simsiam::Form;
using vi_simsiam::Link;
using vi_simsiam::MultiviewProblem;
using Strides = std::pair<int64_t, int64_t>;  // from view to view, from sample to sample

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, not " + name);
}

Form parse_form(const std::string& name) {
  if (name == "cosine") return Form::cosine;
  if (name == "raw_concentration") return Form::raw_concentration;
  if (name == "given_concentration") return Form::given_concentration;
  throw std::invalid_argument(
      "form must be cosine, raw_concentration or given_concentration, not " + name);
}

Link parse_link(const std::string& name) {
  if (name == "softplus") return Link::softplus;
  if (name == "quadratic") return Link::quadratic;
  throw std::invalid_argument("link must be softplus or quadratic, not " + name);
}

template <typename Pointer>
Pointer pointer(uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

void copy_addresses(const void** out, const std::vector<uintptr_t>& addresses, const char* name) {
  if (addresses.empty() || addresses.size() > vi_simsiam::MAX_VIEWS)
    throw std::invalid_argument(std::string(name) + ": 1 to 16 views are accepted");
  for (size_t i = 0; i < addresses.size(); ++i) out[i] = pointer<const void*>(addresses[i]);
}

// Wraps a backend into a function of Python that takes a problem's fields as keywords.
template <typename... Extra, typename Run>
auto with_problem(Run run) {
  return [run](const std::vector<uintptr_t>& predictions, const std::vector<uintptr_t>& targets,
               uintptr_t concentration, uintptr_t loss, uintptr_t mean, uintptr_t gradient,
               uintptr_t concentration_gradient, int64_t batch, int64_t dim, int64_t width,
               int64_t prediction_stride, int64_t target_stride, const Strides& gradient_strides,
               const std::string& form, const std::string& link, double scale, double minimum,
               double gain, double cosine, double weight, double gradient_weight, Extra... extra) {
    MultiviewProblem problem{};
    problem.form = parse_form(form);
    problem.link = parse_link(link);
    problem.views = int64_t(predictions.size());
    problem.target_views = int64_t(targets.size());
    problem.batch = batch;
    problem.dim = dim;
    problem.width = width;
    copy_addresses(problem.predictions, predictions, "predictions");
    copy_addresses(problem.targets, targets, "targets");
    problem.concentration = pointer<const void*>(concentration);
    problem.loss = pointer<void*>(loss);
    problem.mean = pointer<void*>(mean);
    problem.gradient = pointer<void*>(gradient);
    problem.concentration_gradient = pointer<void*>(concentration_gradient);
    problem.prediction_stride = prediction_stride;
    problem.target_stride = target_stride;
    problem.gradient_view_stride = gradient_strides.first;
    problem.gradient_stride = gradient_strides.second;
    problem.scale = scale;
    problem.minimum = minimum;
    problem.gain = gain;
    problem.cosine = cosine;
    problem.weight = weight;
    problem.gradient_weight = gradient_weight;
    run(problem, extra...);
  };
}

template <typename Function, typename... Extra>
void define_with_problem(py::module_& m, const char* name, Function function, const char* doc,
                         Extra... extra) {
  m.def(name, function, py::arg("predictions"), py::arg("targets"), py::arg("concentration"),
        py::arg("loss"), py::arg("mean"), py::arg("gradient"), py::arg("concentration_gradient"),
        py::arg("batch"), py::arg("dim"), py::arg("width"), py::arg("prediction_stride"),
        py::arg("target_stride"), py::arg("gradient_strides"), py::arg("form"), py::arg("link"),
        py::arg("scale"), py::arg("minimum"), py::arg("gain"), py::arg("cosine"), py::arg("weight"),
        py::arg("gradient_weight"), extra..., doc);
}

template <typename Error>
void throw_if(const char* name, const char* error) {
  if (error != nullptr) throw Error(std::string(name) + ": " + error);
}

void multiview_loss_cpu(const MultiviewProblem& problem, const std::string& prediction_dtype,
                        const std::string& target_dtype, int threads) {
  const DType prediction = parse_dtype(prediction_dtype), target = parse_dtype(target_dtype);
  const char* error = nullptr;
  {
    py::gil_scoped_release release;
    error = vi_simsiam::multiview_loss_cpu(problem, prediction, target, threads);
  }
  throw_if<std::invalid_argument>("multiview_loss_cpu", error);
}

BatchNormProblem batch_norm(int64_t rows, int64_t channels, int64_t groups, bool relu) {
  BatchNormProblem problem{};
  problem.rows = rows;
  problem.channels = channels;
  problem.groups = groups;
  problem.relu = relu;
  return problem;
}

template <typename Solve>
void run_batch_norm(Solve solve, const BatchNormProblem& problem, const std::string& dtype,
                    int threads) {
  const DType element = parse_dtype(dtype);
  const char* error = nullptr;
  {
    py::gil_scoped_release release;
    error = solve(problem, element, threads);
  }
  throw_if<std::invalid_argument>("batch_norm", error);
}

void batch_norm_forward_cpu(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias,
                            uintptr_t running_mean, uintptr_t running_var, uintptr_t y,
                            uintptr_t statistics, int64_t rows, int64_t channels, int64_t groups,
                            bool relu, double momentum, double eps, const std::string& dtype,
                            int threads) {
  BatchNormProblem problem = batch_norm(rows, channels, groups, relu);
  problem.momentum = momentum;
  problem.eps = eps;
  problem.x = pointer<const void*>(x);
  problem.residual = pointer<const void*>(residual);
  problem.weight = pointer<const void*>(weight);
  problem.bias = pointer<const void*>(bias);
  problem.running_mean = pointer<void*>(running_mean);
  problem.running_var = pointer<void*>(running_var);
  problem.y = pointer<void*>(y);
  problem.statistics = pointer<void*>(statistics);
  run_batch_norm(vi_simsiam::batch_norm_forward_cpu, problem, dtype, threads);
}

void batch_norm_backward_cpu(uintptr_t gradient, uintptr_t x, uintptr_t y, uintptr_t weight,
                             uintptr_t bias, uintptr_t statistics, uintptr_t by_x,
                             uintptr_t by_residual, uintptr_t by_weight, uintptr_t by_bias,
                             int64_t rows, int64_t channels, int64_t groups, bool relu,
                             const std::string& dtype, int threads) {
  BatchNormProblem problem = batch_norm(rows, channels, groups, relu);
  problem.gradient = pointer<const void*>(gradient);
  problem.x = pointer<const void*>(x);
  problem.y = pointer<void*>(y);
  problem.weight = pointer<const void*>(weight);
  problem.bias = pointer<const void*>(bias);
  problem.statistics = pointer<void*>(statistics);
  problem.by_x = pointer<void*>(by_x);
  problem.by_residual = pointer<void*>(by_residual);
  problem.by_weight = pointer<void*>(by_weight);
  problem.by_bias = pointer<void*>(by_bias);
  run_batch_norm(vi_simsiam::batch_norm_backward_cpu, problem, dtype, threads);
}

#if defined(VI_SIMSIAM_CUDA)
void multiview_loss_cuda(const MultiviewProblem& problem, const std::string& prediction_dtype,
                         const std::string& target_dtype, const std::string& gradient_dtype,
                         uintptr_t ticket, uintptr_t stream) {
  throw_if<std::runtime_error>("multiview_loss_cuda",
                               vi_simsiam::multiview_loss_cuda(problem,
                                                               parse_dtype(prediction_dtype),
                                                               parse_dtype(target_dtype),
                                                               parse_dtype(gradient_dtype),
                                                               pointer<uint32_t*>(ticket),
                                                               pointer<void*>(stream)));
}

void scale_gradient_cuda(uintptr_t gradient, uintptr_t out, uintptr_t concentration_gradient,
                         uintptr_t factor, int64_t views, int64_t batch, int64_t width,
                         const Strides& gradient_strides, const Strides& out_strides,
                         int64_t factor_stride, const std::string& gradient_dtype,
                         const std::string& out_dtype, uintptr_t stream) {
  vi_simsiam::ScaledGradient problem{};
  problem.views = views;
  problem.batch = batch;
  problem.width = width;
  problem.gradient = pointer<const void*>(gradient);
  problem.gradient_view_stride = gradient_strides.first;
  problem.gradient_stride = gradient_strides.second;
  problem.out = pointer<void*>(out);
  problem.out_view_stride = out_strides.first;
  problem.out_stride = out_strides.second;
  problem.concentration_gradient = pointer<void*>(concentration_gradient);
  problem.factor = pointer<const void*>(factor);
  problem.factor_stride = factor_stride;
  throw_if<std::runtime_error>("scale_gradient_cuda",
                               vi_simsiam::scale_gradient_cuda(problem, parse_dtype(gradient_dtype),
                                                               parse_dtype(out_dtype),
                                                               pointer<void*>(stream)));
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
  m.doc() = "Compiled backends of the multi-view loss and of BatchNorm, on raw addresses.";

  define_with_problem(m, "multiview_loss_cpu",
                      with_problem<const std::string&, const std::string&, int>(multiview_loss_cpu),
                      "Writes the loss (batch,) and every output with an address, on the host.",
                      py::arg("prediction_dtype"), py::arg("target_dtype"), py::arg("threads"));

  m.def("batch_norm_forward_cpu", &batch_norm_forward_cpu, py::arg("x"), py::arg("residual"),
        py::arg("weight"), py::arg("bias"), py::arg("running_mean"), py::arg("running_var"),
        py::arg("y"), py::arg("statistics"), py::arg("rows"), py::arg("channels"),
        py::arg("groups"), py::arg("relu"), py::arg("momentum"), py::arg("eps"), py::arg("dtype"),
        py::arg("threads"), "Writes y and the statistics (2, groups, channels), on the host.");
  m.def("batch_norm_backward_cpu", &batch_norm_backward_cpu, py::arg("gradient"), py::arg("x"),
        py::arg("y"), py::arg("weight"), py::arg("bias"), py::arg("statistics"), py::arg("by_x"),
        py::arg("by_residual"), py::arg("by_weight"), py::arg("by_bias"), py::arg("rows"),
        py::arg("channels"), py::arg("groups"), py::arg("relu"), py::arg("dtype"),
        py::arg("threads"), "Writes every gradient with an address, on the host.");

#if defined(VI_SIMSIAM_CUDA)
  define_with_problem(m, "multiview_loss_cuda",
                      with_problem<const std::string&, const std::string&, const std::string&,
                      uintptr_t, uintptr_t>(multiview_loss_cuda),
                      "Enqueues the same computation on a stream of the current device.",
                      py::arg("prediction_dtype"), py::arg("target_dtype"),
                      py::arg("gradient_dtype"), py::arg("ticket"), py::arg("stream"));
  m.def("scale_gradient_cuda", &scale_gradient_cuda, py::arg("gradient"), py::arg("out"),
        py::arg("concentration_gradient"), py::arg("factor"), py::arg("views"), py::arg("batch"),
        py::arg("width"), py::arg("gradient_strides"), py::arg("out_strides"),
        py::arg("factor_stride"), py::arg("gradient_dtype"), py::arg("out_dtype"),
        py::arg("stream"),
        "Enqueues the product of a gradient (views, batch, width) and a device factor.");
  m.def("cuda_problem", &vi_simsiam::cuda_problem,
        "The reason why the kernels cannot run on the current device, or None if they can.");
#endif

  m.def("power_spherical_terms", &power_spherical_terms<float>, py::arg("kappa").noconvert(),
        py::arg("cosine").noconvert(), py::arg("dim"),
        "(F, dF/dkappa, dF/dcosine) of float32 arrays, by the code of both compiled backends.");
  m.def("power_spherical_terms", &power_spherical_terms<double>, py::arg("kappa").noconvert(),
        py::arg("cosine").noconvert(), py::arg("dim"), "The same of float64 arrays.");
  m.def("build_info", &build_info,
        "Compiler, vector instructions used here, CUDA version (or None), architectures.");
}
