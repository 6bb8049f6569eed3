#pragma once

#include <string>

namespace edgepack {

// SHA-256 (FIPS 180-4) of a file, in hexadecimal. Throws std::runtime_error when it cannot be read.
std::string sha256_of_file(const std::string& path);

}  // namespace edgepack
