# What the project is built from: Debian's packages by find_package, LibTorch and two .proto files from the cached folder.
find_package(Threads REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(absl CONFIG REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(nlohmann_json REQUIRED)
find_program(DELTANET_PROTOC protoc REQUIRED)
find_program(DELTANET_GRPC_CPP_PLUGIN grpc_cpp_plugin REQUIRED)
find_library(DELTANET_HTTPLIB cpp-httplib REQUIRED)
find_library(DELTANET_GRPC_REFLECTION grpc++_reflection REQUIRED)

if(NOT DELTANET_CACHE)
  if(DEFINED ENV{DELTANET_CACHE})
    set(deltanet_cache $ENV{DELTANET_CACHE})
  else()
    set(deltanet_cache $ENV{HOME}/.cache/deltanet)
  endif()
else()
  set(deltanet_cache ${DELTANET_CACHE})
endif()
file(GLOB deltanet_site_packages ${deltanet_cache}/venv/lib/python3*/site-packages)
set(DELTANET_PYTHON ${deltanet_cache}/venv/bin/python)

# google/rpc/{status,error_details}.proto are in no Debian package.
find_path(DELTANET_GOOGLEAPIS google/rpc/status.proto HINTS ${deltanet_site_packages} NO_DEFAULT_PATH)
if(NOT DELTANET_GOOGLEAPIS)
  message(FATAL_ERROR "google/rpc/status.proto not found under ${deltanet_cache}: run deploy/install.sh first")
endif()

if(DELTANET_LIBTORCH)
  set(libtorch ${DELTANET_LIBTORCH})
else()
  set(libtorch ${deltanet_site_packages}/torch)
endif()
if(NOT EXISTS ${libtorch}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "no LibTorch at '${libtorch}': run deploy/install.sh, or name one with -DDELTANET_LIBTORCH=DIR")
endif()

# The wheel carries Protobuf 3.13 headers that would shadow Debian's: -idirafter, and only for files of the model room.
add_library(deltanet_libtorch INTERFACE)
target_compile_options(deltanet_libtorch INTERFACE
  "SHELL:-idirafter ${libtorch}/include" "SHELL:-idirafter ${libtorch}/include/torch/csrc/api/include")
foreach(name torch_cpu c10)
  add_library(libtorch::${name} SHARED IMPORTED)
  set_target_properties(libtorch::${name} PROPERTIES IMPORTED_LOCATION ${libtorch}/lib/lib${name}.so)
  target_link_libraries(deltanet_libtorch INTERFACE libtorch::${name})
endforeach()
# libtorch_cpu.so finds its own needs (libgomp, cudart, cupti) by its rpath; the linker need not follow them.
target_link_options(deltanet_libtorch INTERFACE "LINKER:--unresolved-symbols=ignore-in-shared-libs"
  "LINKER:--allow-shlib-undefined")

if(DELTANET_CUDA)
  # nvcc and the CUDA libraries come as wheels, without the layout that CMake's own modules look for.
  find_path(deltanet_cu13 bin/nvcc HINTS ${deltanet_site_packages}/nvidia/cu13 NO_DEFAULT_PATH)
  if(NOT deltanet_cu13)
    message(FATAL_ERROR "no nvcc under ${deltanet_cache}: run 'deploy/install.sh cuda' first")
  endif()
  set(CMAKE_CUDA_COMPILER ${deltanet_cu13}/bin/nvcc)
  set(CMAKE_CUDA_FLAGS "-L${deltanet_cu13}/lib")  # The wheel has no lib64, where nvcc looks.
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)
  set(CMAKE_CUDA_ARCHITECTURES ${DELTANET_CUDA_ARCHITECTURES})
  enable_language(CUDA)
  foreach(name torch_cuda c10_cuda)
    add_library(libtorch::${name} SHARED IMPORTED)
    set_target_properties(libtorch::${name} PROPERTIES IMPORTED_LOCATION ${libtorch}/lib/lib${name}.so)
  endforeach()
  foreach(name cudart cublasLt)
    add_library(libtorch::${name} SHARED IMPORTED)
    set_target_properties(libtorch::${name} PROPERTIES IMPORTED_LOCATION ${deltanet_cu13}/lib/lib${name}.so.13)
  endforeach()
  # libtorch_cuda.so registers its operators when it is loaded, which programs need that name no symbol of it.
  target_link_libraries(deltanet_libtorch INTERFACE
    "$<LINK_LIBRARY:deltanet_as_needed_off,libtorch::torch_cuda>" libtorch::c10_cuda libtorch::cublasLt
    libtorch::cudart)
  target_compile_options(deltanet_libtorch INTERFACE "SHELL:-idirafter ${deltanet_cu13}/include")
  set(CMAKE_LINK_LIBRARY_USING_deltanet_as_needed_off
    "LINKER:--push-state,--no-as-needed" "<LINK_ITEM>" "LINKER:--pop-state")
  set(CMAKE_LINK_LIBRARY_USING_deltanet_as_needed_off_SUPPORTED TRUE)
endif()
