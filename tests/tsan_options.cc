// ThreadSanitizer's settings, linked into every test of the tsan preset.
//
// Debian's gRPC, Protobuf and abseil are not built for it: it sees their accesses to memory but not all of
// their locks, and so reports races where there are none. Hence it ignores what the libraries themselves do,
// and here the parts of gRPC that its headers compile into our programs, each handed from thread to thread by
// the library. Our own code, called back by gRPC, stays checked. A report whose older stack is lost matches no
// suppression: hence the longer history.
extern "C" const char* __tsan_default_options() { return "ignore_noninstrumented_modules=1 history_size=7"; }

extern "C" const char* __tsan_default_suppressions() {
  return "race:grpc::internal::CallOp\n"
         "race:grpc::internal::Call::\n"
         "race:grpc::internal::InterceptorBatchMethodsImpl\n"
         "race:grpc::internal::DefaultMessageHolder\n"
         "race:grpc::internal::FinishOnlyReactor\n"
         "race:grpc::ByteBuffer\n"
         "race:grpc::ServerUnaryReactor::\n"
         "race:::BindReactor\n"
         "race:::InternalBindStream\n"
         "race:::PreBindBacklog::\n"
         "race:grpc_event_engine\n"
         "race:::Deserialize(grpc_call\n"
         // Our reactors are called from these: only what they do themselves, not what is called from them.
         "race_top:grpc::internal::Callback\n"
         "race_top:std::function<void (bool)>\n"
         "race_top:std::function<void ()>::function\n"
         "race_top:std::_Function_\n"
         "race_top:std::__atomic_base\n";
}
