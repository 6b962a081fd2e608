// ThreadSanitizer's settings, linked into every test of the tsan preset.
//
// Debian's gRPC, Protobuf and abseil are not built for it: it sees their accesses to memory but not all of
// their locks, and so reports races where there are none. Hence it ignores what the libraries themselves do,
// and here the parts of gRPC that its headers compile into our programs, each handed from thread to thread by
// the library. Our own code, called back by gRPC, stays checked.
extern "C" const char* __tsan_default_options() { return "ignore_noninstrumented_modules=1"; }

extern "C" const char* __tsan_default_suppressions() {
  return "race:grpc::internal::CallOp\n"
         "race:grpc::internal::Call::\n"
         "race:grpc::internal::InterceptorBatchMethodsImpl\n"
         "race:grpc::ByteBuffer\n";
}
