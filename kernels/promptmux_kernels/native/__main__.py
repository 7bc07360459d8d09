"""`python -m promptmux_kernels.native [--ship]`: compile the CPU ops now rather than at first use.

`--ship` puts a library for every instruction set beside the sources, for an image that runs without a compiler.
"""

from __future__ import annotations

import platform
import sys

from promptmux_kernels.native.build import BuildError, capability, find_or_build, ship

X86_64 = ("x86_64", "AMD64")


def main(arguments: list[str]) -> int:
    try:
        if platform.machine() not in X86_64:
            print("The CPU ops are written for x86-64: the plain PyTorch form serves this machine.")
        elif arguments == ["--ship"]:
            print(*ship(), sep="\n")
        elif level := capability():
            print(find_or_build(level))
        else:
            print("This CPU has no AVX2 with FMA: the plain PyTorch form serves it.")
    except BuildError as error:
        print(f"CPU kernels: {error}; the plain PyTorch form serves instead.", file=sys.stderr)
        return 1 if "--ship" in arguments else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
