# cmake -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake …: build for 64-bit ARM Linux on another machine.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Lets ctest run the result here, if qemu-user is installed; EMULATOR_ROOT holds the target's lib/.
set(EMULATOR_ROOT "/usr/aarch64-linux-gnu" CACHE PATH "System root of the emulated program")
find_program(EMULATOR qemu-aarch64)
if(EMULATOR)
  set(CMAKE_CROSSCOMPILING_EMULATOR "${EMULATOR};-L;${EMULATOR_ROOT}")
endif()
# The engine's library asks for others that the linker need not see.
set(CMAKE_EXE_LINKER_FLAGS_INIT "-Wl,--allow-shlib-undefined")
