#include <iostream>

#include "client/command.h"

int main(int argc, char** argv) {
  return deltanet::RunClient({argv + 1, argv + argc}, {std::cout, std::cerr});
}
