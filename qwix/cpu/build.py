"""Compiles the native kernels. It needs a C++17 compiler and the headers of jaxlib, and no package but Python's own.

`setup.py` runs it when the package is installed, and `native.py` when the library that it finds belongs to
other sources or another jaxlib, as after an edit, so that there is nothing to remember while developing:

    python -m qwix.cpu.build                  # into the package, as an installation does
    python -m qwix.cpu.build --sanitize OUT   # with AddressSanitizer and UndefinedBehaviorSanitizer
    python -m qwix.cpu.build --emulate OUT    # every instruction set, on SIMDe's functions where this CPU lacks it
"""

import argparse
import concurrent.futures
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

SOURCES = pathlib.Path(__file__).parent / "csrc"
# Nobody reads the floating-point exceptions' flags; without them a comparison is no obstacle to vectors.
FLAGS = ("-std=c++17", "-fPIC", "-Wall", "-Wextra", "-fno-trapping-math")

# The files for one instruction set each: what they are compiled with. A compiler that does not know a flag leaves
# its file out.
_AVX2 = ("-O3", "-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
_X86: dict[str, tuple[str, ...]] = {
    "avx2": _AVX2,
    "avx_vnni": (*_AVX2, "-mavxvnni"),
    "avx512_vnni": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
_ARM: dict[str, tuple[str, ...]] = {"neon_dotprod": ("-O3", "-march=armv8.2-a+dotprod")}
# SIMDe (https://github.com/simd-everywhere/simde) has intrinsics of all of them as plain functions.
_EMULATED: dict[str, tuple[str, ...]] = dict.fromkeys([*_X86, *_ARM], ("-O2", "-w"))
_MACHINES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "x86_64": ("QWIX_X86", _X86),
    "amd64": ("QWIX_X86", _X86),
    "aarch64": ("QWIX_ARM", _ARM),
}
_MACHINES["arm64"] = _MACHINES["aarch64"]


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says what is missing."""


def fingerprint() -> str:
    """Names the sources: changes with any of them, and with this file."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.iterdir(), pathlib.Path(__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def library_name(suffix: str = "") -> str:
    """The file name of the library that these sources make."""
    return f"_native-{fingerprint()}{suffix}.so"


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: `$CXX`, or the first of c++, g++ and clang++; None if there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        command = name.split() if name else []
        if command and shutil.which(command[0]):
            return command
    return None


def compile_library(
    output: pathlib.Path,
    include_dir: str | os.PathLike[str],
    extra: tuple[str, ...] = (),
    emulated: bool = False,
    only: frozenset[str] | None = None,
) -> None:
    """Compiles the kernels into a shared library.

    Args:
      output: the library's path, which appears when it is complete.
      include_dir: that of jaxlib, `jax.ffi.include_dir()`.
      extra: flags for compiling and linking.
      emulated: every instruction set, for tests; needs SIMDe's headers (libsimde-dev on Debian).
      only: the names of the instruction sets that are compiled, besides the portable kernels. Default: all.

    Raises:
      BuildError: there is no compiler, or it fails; the message has the command and the end of its output.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found: install g++ or clang++, or name one in the variable CXX")
    if os.name != "posix":
        raise BuildError(f"the kernels have been compiled on Linux and macOS only, not on {sys.platform}")
    machine, variants = _MACHINES.get(platform.machine().lower(), ("", {}))
    defines = [f"-D{machine}"] if machine else []
    if emulated:
        variants = _EMULATED
        defines.append("-DQWIX_EMULATED")
    with tempfile.TemporaryDirectory() as scratch:
        objects = pathlib.Path(scratch)
        wanted = {name: flags for name, flags in variants.items() if only is None or name in only}
        known = {name: flags for name, flags in wanted.items() if _accepts(compiler, flags, objects)}
        defines += [f"-DQWIX_{name.upper()}" for name in known]
        jobs = {name: list(flags) for name, flags in known.items()} | {"portable": ["-O2"]}
        commands = [
            [*flags, str(SOURCES / f"kernels_{name}.cc"), "-o", str(objects / f"{name}.o")]
            for name, flags in jobs.items()
        ]
        commands += [
            ["-O2", str(SOURCES / f"{name}.cc"), "-o", str(objects / f"{name}.o")] for name in ("ffi", "registry")
        ]
        common = [*compiler, *FLAGS, *defines, "-isystem", os.fspath(include_dir), "-c"]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda command: _run([*common, *command, *extra]), commands))
        library = objects / "library.so"
        _run([*compiler, "-shared", *extra, *map(str, sorted(objects.glob("*.o"))), "-o", str(library)])
        output.parent.mkdir(parents=True, exist_ok=True)
        # Another process may build it too, or load it while it is copied.
        partial = output.with_name(f"{output.name}.{os.getpid()}")
        shutil.copy(library, partial)
        partial.replace(output)


def _runnable() -> frozenset[str] | None:
    """The instruction sets of this CPU, as far as Linux tells; None: unknown."""
    try:
        words = frozenset(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return None
    named_otherwise = {"amx": "amx_bf16", "neon_dotprod": "asimddp"}
    return frozenset(name for name in {**_X86, **_ARM} if named_otherwise.get(name, name) in words)


def _accepts(compiler: list[str], flags: tuple[str, ...], scratch: pathlib.Path) -> bool:
    source = scratch / "empty.cc"
    source.write_text("")
    command = [*compiler, *flags, "-Werror", "-c", str(source), "-o", str(scratch / "empty.out")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"the compiler failed: {' '.join(command)}\n{result.stderr[-4000:]}")


def main() -> None:
    """Compiles for the jaxlib of this environment."""
    import jax.ffi

    parser = argparse.ArgumentParser(description="Compile the native CPU kernels of qwix.")
    parser.add_argument("--sanitize", metavar="OUT", help="with sanitizers, to this path")
    parser.add_argument("--emulate", metavar="OUT", help="with every instruction set, to this path")
    args = parser.parse_args()
    if args.emulate:
        compile_library(pathlib.Path(args.emulate), jax.ffi.include_dir(), emulated=True)
    elif args.sanitize:
        extra = (
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=undefined",
            "-fno-omit-frame-pointer",
            "-g1",
            "-O1",
        )
        # Each of these takes minutes, so only what runs here is compiled.
        compile_library(pathlib.Path(args.sanitize), jax.ffi.include_dir(), extra, only=_runnable())
    else:
        compile_library(pathlib.Path(__file__).parent / library_name(), jax.ffi.include_dir())


if __name__ == "__main__":
    main()
