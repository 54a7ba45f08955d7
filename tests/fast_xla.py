"""Flags with which XLA compiles fast what runs once.

Its own passes, the partitioner among them, run as ever.
"""

import importlib.metadata

# Compiling is most of the tests' time. LLVM's optimisations are half of it; jaxlib 0.10's older
# code generator, which 0.12 no longer has, takes a fifth of what is left.
FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
