"""The C++ kernels. `_cpu` is compiled from the sources beside this file; `fate.kernels` is its only caller."""
