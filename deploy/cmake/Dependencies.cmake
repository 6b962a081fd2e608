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
