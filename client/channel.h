// How this client connects; the load generator works on the channel itself.
#ifndef DELTANET_CLIENT_CHANNEL_H_
#define DELTANET_CLIENT_CHANNEL_H_

#include <grpcpp/channel.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "client/client.h"

namespace deltanet {

// A channel with a TCP connection of its own. Blocks and errors as Client::Connect.
absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const std::string& target,
                                                           const ClientOptions& options);

}  // namespace deltanet

#endif  // DELTANET_CLIENT_CHANNEL_H_
